package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

const (
	// module is the module of this command. The tests in it have the versions of LiveKit and of Element Call.
	module = "github.com/matrix-org/dendrite/setup/mscs/msc4140"
	// livekitModule is the folder of the module in which LiveKit is built, and livekitServer is its package.
	livekitModule, livekitServer = "test/elementcall/livekit", "github.com/livekit/livekit-server/cmd/server"
	// npmFolder is the folder whose package-lock.json names Element Call's package and its hash, and pagesFolder is where npm puts the pages.
	npmFolder, pagesFolder = "test/elementcall/js", "node_modules/@element-hq/element-call-embedded/dist"
)

// parts are what a call is made of: the paths of two programs, and the folder with the pages.
type parts struct {
	homeserver, livekit, pages string
}

// getParts builds and downloads what the options do not name. The tools do it in the cache, and next time only what has changed.
func getParts(ctx context.Context, screen *screen, cache string, o options) (p parts, err error) {
	p = parts{livekit: o.livekit, pages: o.pages}
	if p.livekit == "" {
		p.livekit, _ = exec.LookPath("livekit-server")
	}
	if err = missing(p, exec.LookPath); err != nil {
		return p, err
	}
	root, err := run(ctx, "go", "list", "-m", "-f", "{{.Dir}}", module)
	if err != nil {
		return p, fmt.Errorf("looking for the sources (is this a checkout of the repository?): %w", err)
	}
	if err = os.MkdirAll(cache, 0o700); err != nil {
		return p, err
	}
	for _, step := range []struct {
		what string
		part *string
		get  func() (string, error)
	}{
		{"building the homeserver (minutes the first time)", &p.homeserver, func() (string, error) { return homeserver.Build(ctx, cache) }},
		{"downloading and building LiveKit (minutes the first time)", &p.livekit, func() (string, error) {
			binary := filepath.Join(cache, "livekit-server")
			_, err := run(ctx, "go", "-C", filepath.Join(root, livekitModule), "build", "-o", binary, livekitServer)
			return binary, err
		}},
		{"downloading Element Call", &p.pages, func() (string, error) { return download(ctx, filepath.Join(root, npmFolder), cache) }},
	} {
		if *step.part != "" {
			screen.print("  using %s\n", *step.part)
			continue
		}
		if err = screen.during(step.what, func() (err error) {
			*step.part, err = step.get()
			return err
		}); err != nil {
			return p, err
		}
	}
	return p, nil
}

// missing returns an error that names each program that is needed and not installed.
func missing(p parts, lookPath func(string) (string, error)) error {
	var errs []error
	if _, err := lookPath("go"); err != nil {
		errs = append(errs, errors.New("go is missing, which builds the homeserver: see https://go.dev/dl/"))
	}
	if _, err := lookPath("npm"); err != nil && p.pages == "" {
		errs = append(errs, errors.New("npm is missing, which downloads Element Call (Debian: apt-get install npm); or name a folder with --pages"))
	}
	return errors.Join(errs...)
}

// download downloads Element Call with npm, and returns the folder with its pages.
func download(ctx context.Context, locked, cache string) (string, error) {
	for _, name := range []string{"package.json", "package-lock.json"} {
		data, err := os.ReadFile(filepath.Join(locked, name))
		if err == nil {
			err = os.WriteFile(filepath.Join(cache, name), data, 0o600)
		}
		if err != nil {
			return "", err
		}
	}
	_, err := run(ctx, "npm", "install", "--prefix", cache, "--ignore-scripts", "--prefer-offline", "--no-audit", "--no-fund")
	return filepath.Join(cache, pagesFolder), err
}

// run runs a program and returns its output without white space around it.
func run(ctx context.Context, name string, args ...string) (string, error) {
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w\n%s", name, args[0], err, bytes.TrimSpace(stderr.Bytes()))
	}
	return string(bytes.TrimSpace(out)), nil
}
