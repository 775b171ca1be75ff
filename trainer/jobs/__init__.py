"""Trainings that outlive the process: jobs, their folders, and the service that runs them."""
