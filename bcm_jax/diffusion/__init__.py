"""The mathematics shared by all methods: processes, schedules, solvers."""
