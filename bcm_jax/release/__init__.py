"""Commands that keep their names: release.hub and release.export."""
