"""Try to break the promises of Poise about faults: see docs/reliability.md.

cases         one call or command in a forked process with limits, and how it ended
material      intact runs, results, images and weights
kills         part 1: SIGKILL at random moments, then resume
mutations     part 2: damage to files
readers       part 2: what reads them
fuzzing       part 2: the cases
storage       part 3: full, read-only and slow disks, the clock, two users of one folder
planted       part 4: NaN and infinity in data, weights and one process; absurd rates
sizes         part 5: a million images, 10,000 results, 200,000 evaluated images
surroundings  part 6: locale, home, read-only packages, no terminal
dependencies  part 7: licences, known vulnerabilities, and what the source must not call
page          the tables of docs/reliability.md
"""
