from superd.cli.superd import main

main()
