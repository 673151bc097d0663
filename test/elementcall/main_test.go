//go:build all

// Package elementcall tests calls with the real Element Call. Two headless Chromiums, a real LiveKit, a reverse proxy and the real
// homeserver run with the configuration that docs/install.md and docs/element-call.md recommend.
package elementcall

import (
	"context"
	"embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/postgres"
)

var (
	// soon is longer than any step of these tests takes, except the waits that have a duration of their own.
	soon = patience.For(2 * time.Minute)
	// buildTimeout limits the download and the build of LiveKit.
	buildTimeout = patience.For(15 * time.Minute)
)

//go:embed js
var scripts embed.FS

// programs are the paths of all programs that are not installed on the machine.
var programs struct {
	dir        string
	homeserver string
	livekit    string
	// elementCall is a folder with the pages of Element Call.
	elementCall string
}

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "msc4140-elementcall-")
	if err == nil && installed() == nil {
		err = makePrograms(dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	postgres.Main(m, func() { _ = os.RemoveAll(dir) })
}

// installed returns an error that names the missing programs.
func installed() error {
	for _, name := range []string{"chromium", "caddy", "node", "npm"} {
		if _, err := exec.LookPath(name); err != nil {
			return fmt.Errorf("%w (Debian: apt-get install chromium caddy nodejs npm)", err)
		}
	}
	return nil
}

// requirePrograms skips a test if programs are missing. In CI, where the environment variable CI is set, the test fails instead.
func requirePrograms(t *testing.T) {
	t.Helper()
	switch err := installed(); {
	case err != nil && os.Getenv("CI") == "":
		t.Skipf("NOT TESTED WITH ELEMENT CALL: %s", err)
	case err != nil:
		t.Fatal(err)
	}
}

// makePrograms builds the homeserver and LiveKit, and downloads Element Call.
func makePrograms(dir string) (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), buildTimeout)
	defer cancel()
	programs.dir = dir
	if programs.homeserver, err = homeserver.Build(ctx, dir); err != nil {
		return err
	}
	programs.livekit = filepath.Join(dir, "livekit-server")
	build := exec.CommandContext(ctx, "go", "build", "-o", programs.livekit, "github.com/livekit/livekit-server/cmd/server")
	build.Dir = "livekit"
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("building LiveKit: %w\n%s", err, out)
	}
	if err = os.CopyFS(dir, scripts); err != nil {
		return err
	}
	npm := exec.CommandContext(ctx, "npm", "ci", "--ignore-scripts", "--prefer-offline", "--no-audit", "--no-fund")
	npm.Dir = filepath.Join(dir, "js")
	if out, err := npm.CombinedOutput(); err != nil {
		return fmt.Errorf("npm ci: %w\n%s", err, out)
	}
	programs.elementCall = filepath.Join(dir, "js", "node_modules", "@element-hq", "element-call-embedded", "dist")
	return nil
}
