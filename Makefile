# `make dist` puts the release into dist/: a tarball for each architecture, and SHA256SUMS.
#
# The same commit and the same version of Go give the same bytes, in whatever folder: nothing in them depends on the time
# (but for that of the commit), the machine or the user.

ARCHS   = amd64 arm64
DIST    = dist
VERSION = $(shell sed -n 's/^const Version = "\(.*\)"/\1/p' version.go)
RELEASE = dendrite-msc4140-$(VERSION)-linux-

export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct)

# What runs on a server without Go: the homeserver; what makes its key and its first users; and what looks whether calls work.
DENDRITE = github.com/matrix-org/dendrite
PROGRAMS = ./cmd/dendrite ./cmd/check $(DENDRITE)/cmd/generate-keys $(DENDRITE)/cmd/create-account
DOCS     = README.md CHANGELOG.md LICENSE docs

dist: $(ARCHS:%=dist-%)
	cd $(DIST) && sha256sum $(ARCHS:%=$(RELEASE)%.tar.gz) > SHA256SUMS

dist-%: tree = $(DIST)/$(RELEASE)$*
dist-%:
	rm -rf $(tree) && mkdir -p $(tree)/bin
	env -u GOFLAGS CGO_ENABLED=0 GOOS=linux GOARCH=$* GOAMD64=v1 GOARM64=v8.0 \
		go build -trimpath -buildvcs=true -ldflags=-s -o $(tree)/bin/ $(PROGRAMS)
	cp -R $(DOCS) $(tree)/
	cd $(DIST) && tar --sort=name --format=gnu --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX \
		--mtime=@$(SOURCE_DATE_EPOCH) -cf - $(notdir $(tree)) | gzip -n > $(notdir $(tree)).tar.gz
	rm -r $(tree)

.PHONY: dist
