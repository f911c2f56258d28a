"""Robots: each module one arm's wire protocol behind the driver contract, the vendor's client imported when it opens."""
