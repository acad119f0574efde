from anyres.cli import main

raise SystemExit(main())
