"""What every part uses: errors, commands, argument types, output directories, JSON. Imports nothing of the other parts."""
