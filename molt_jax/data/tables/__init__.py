"""Reading tables as people have them: each kind of file becomes `records.Records`, and those become
rows by one rule for cells.
"""
