# `make dist` puts the release into dist/: a tarball for each architecture, and SHA256SUMS. `make dist ARCHS=amd64` makes one.
#
# The first time it compiles some 700 packages for each architecture: ten minutes on two idle cores, half an hour on busy ones.
# It says how far it is. Afterwards Go's build cache has them, and it takes a minute.
#
# The same commit and the same version of Go give the same bytes in any folder: nothing in them depends on the machine, the user
# or the time, except the time of the commit.

SHELL       = /bin/bash
.SHELLFLAGS = -o pipefail -c

ARCHS   = amd64 arm64
DIST    = dist
VERSION = $(shell sed -n 's/^const Version = "\(.*\)"/\1/p' version.go)
RELEASE = dendrite-msc4140-$(VERSION)-linux-

export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct)

# The programs for a server without Go: the homeserver, the tools that make its key and its first users, and the check for calls.
DENDRITE = github.com/matrix-org/dendrite
PROGRAMS = ./cmd/dendrite ./cmd/check $(DENDRITE)/cmd/generate-keys $(DENDRITE)/cmd/create-account
DOCS     = README.md CHANGELOG.md SECURITY.md LICENSE docs

# Links from the documents to files that only the repository has. TestLinks fails if one is missing here.
UNPACKED = ARCHITECTURE|CONTRIBUTING|docker|patches|test

# Counts the packages that `go build -v` names, and passes on everything else.
PROGRESS = awk '!/^[^ :]+$$/ { print; next } ++n % 50 == 0 { print "  " n " packages compiled"; fflush() }'

dist: $(ARCHS:%=dist-%)
	cd $(DIST) && sha256sum $(ARCHS:%=$(RELEASE)%.tar.gz) > SHA256SUMS
	@cat $(DIST)/SHA256SUMS

dist-%: tree = $(DIST)/$(RELEASE)$*
dist-%:
	@echo "linux/$*: compiling up to 700 packages. The first time this takes 5 to 15 minutes."
	rm -rf $(tree) && mkdir -p $(tree)/bin
	env -u GOFLAGS CGO_ENABLED=0 GOOS=linux GOARCH=$* GOAMD64=v1 GOARM64=v8.0 \
		go build -v -trimpath -buildvcs=true -ldflags=-s -o $(tree)/bin/ $(PROGRAMS) 2>&1 | $(PROGRESS)
	@echo "linux/$*: packing"
	$(MAKE) --no-print-directory docs tree=$(tree)
	cd $(DIST) && tar --sort=name --format=gnu --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX \
		--mtime=@$(SOURCE_DATE_EPOCH) -cf - $(notdir $(tree)) | gzip -n > $(notdir $(tree)).tar.gz
	rm -r $(tree)

# The documents of a release, in the folder $(tree). A link to a file of the repository becomes plain text.
docs:
	mkdir -p $(tree) && cp -R $(DOCS) $(tree)/
	find $(tree) -name '*.md' -exec sed -i -E \
		's,\[([^]]*)\]\((\.\./)*($(UNPACKED))[^)]*\),\1 (in the repository),g' {} +

.PHONY: dist docs
