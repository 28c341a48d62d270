"""What runs moejax elsewhere: container, Kubernetes, systemd, Grafana."""
