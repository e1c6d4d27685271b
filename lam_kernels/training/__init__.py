"""What every training command shares: loop, checkpoint, progress, memory, table, pictures. One
file each.
"""
