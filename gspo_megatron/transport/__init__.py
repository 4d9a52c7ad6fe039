"""What travels between trainer, controller and servers."""
