"""Files to deploy moejax: container, Kubernetes, systemd, Grafana."""
