# `make run` and `make test` do all their set-up themselves, as root or not, in $(VENV).
#
#   make run            the daemon in the foreground on the examples of conf.d; Ctrl-C stops it
#   make test           ruff, mypy --strict, pytest.   make test ARGS='-k admission -x'
#   make man            what is made from the code: key sections of superd.toml(5), states of superd(8), JSON Schemas
#   make bench          superd beside the other superservers; ARGS=--scale: superd alone, growing
#   make faults         faults injected into a daemon under load, and a table; as root.   make faults ARGS='--soak 600'
#                       or ARGS=--beside: xinetd and openbsd-inetd under the same bad clients
#   make fuzz           each fuzzer for a minute
#   make install-man    man pages to $(DESTDIR)$(MANDIR)
#   make install-completion     what bash, zsh and fish complete superctl with, below $(DESTDIR)$(DATADIR)

PYTHON  ?= python3
VENV    ?= .venv
MANDIR  ?= /usr/local/share/man
DATADIR ?= /usr/local/share
ARGS    ?=
# Several test files at a time: `make test PARALLEL=` runs one after the other.
PARALLEL ?= -n auto --dist loadfile

# Where the examples and the control socket have their UNIX sockets: not in /tmp itself, where everybody may write.
export SUPERD_EXAMPLES ?= /tmp/superd-example-$(shell id -u)

bin := $(VENV)/bin
pip := $(bin)/python -m pip install --quiet --disable-pip-version-check
# A line in a .pth file: the import hook that is the default costs each start 10 ms.
in_place := --config-settings editable_mode=compat --editable

.PHONY: run test lint man bench faults fuzz install-man install-completion clean
.DELETE_ON_ERROR:

run: $(VENV)/.run
	@mkdir -p -m 755 $(SUPERD_EXAMPLES)
	USER=$$(id -un) PATH="$(abspath $(bin)):$$PATH" exec $(bin)/superd -c . --control unix:$(SUPERD_EXAMPLES)/control.sock $(ARGS)

test: lint
	$(bin)/python -m pytest $(PARALLEL) $(ARGS)

lint: $(VENV)/.test
	$(bin)/ruff check .
	$(bin)/mypy

bench: $(VENV)/.test
	$(bin)/python tests/bench/run.py $(ARGS)

faults: $(VENV)/.test
	$(bin)/python tests/faults/run.py $(ARGS)

fuzz: $(VENV)/.test
	SUPERD_FUZZ_S=$${SUPERD_FUZZ_S:-60} $(bin)/python -m pytest -n auto tests/fuzz $(ARGS)

man: $(VENV)/.run
	$(bin)/python -m superd.cli.manual man/superd.toml.5
	$(bin)/superctl schema service >schema/service.json
	$(bin)/superctl schema superd >schema/superd.json
	$(bin)/python tests/update_manual.py

install-man:
	install -D -m 644 man/superctl.1 $(DESTDIR)$(MANDIR)/man1/superctl.1
	install -D -m 644 man/superd.8 $(DESTDIR)$(MANDIR)/man8/superd.8
	install -D -m 644 man/superd.toml.5 $(DESTDIR)$(MANDIR)/man5/superd.toml.5
	install -D -m 644 man/superd-migrate.7 $(DESTDIR)$(MANDIR)/man7/superd-migrate.7

install-completion: $(VENV)/.run
	install -d $(DESTDIR)$(DATADIR)/bash-completion/completions $(DESTDIR)$(DATADIR)/zsh/site-functions \
	    $(DESTDIR)$(DATADIR)/fish/vendor_completions.d
	$(bin)/superctl completion bash >$(DESTDIR)$(DATADIR)/bash-completion/completions/superctl
	$(bin)/superctl completion zsh >$(DESTDIR)$(DATADIR)/zsh/site-functions/_superctl
	$(bin)/superctl completion fish >$(DESTDIR)$(DATADIR)/fish/vendor_completions.d/superctl.fish

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find superd tests -name __pycache__ -prune -exec rm -rf {} +

# Installed in place: a change of the code needs no new installation, a change of pyproject.toml does.
$(VENV)/.run: $(bin)/python pyproject.toml
	$(pip) $(in_place) .
	@touch $@

$(VENV)/.test: $(bin)/python pyproject.toml
	$(pip) $(in_place) '.[test]'
	@touch $@ $(VENV)/.run

# Debian and Ubuntu put ensurepip, which venv needs for pip, into a package of its own.
$(bin)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "make: $(PYTHON) is older than Python 3.11; name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	    { [ "$$(id -u)" = 0 ] && apt-get update -q && apt-get install -qy --no-install-recommends python3-venv; } || \
	    { echo "make: cannot make $(VENV): python3-venv is missing; install it: sudo apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
