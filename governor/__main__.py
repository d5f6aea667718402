from governor.cli import main

main(prog_name="governor")
