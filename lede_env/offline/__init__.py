"""Offline datasets: what each is made of, making, finding and checking them, their cards."""
