"""The web console of the personalisation service: pages made by the server, which need no other host and no script."""
