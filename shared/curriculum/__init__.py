"""The course as data: weeks, claims, exercises, faults and devlogs, and the runner that executes them."""
