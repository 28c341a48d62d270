"""The commands of `moejax plan`: reports, explanations, plots and exports."""
