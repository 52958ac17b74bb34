"""What Prometheus and Grafana need: where to scrape, when to alert, what to show."""
