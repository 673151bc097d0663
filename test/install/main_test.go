//go:build all

// Package install tests the files in docs/install, docs/element-call and docs/lk-jwt-service. It runs the real proxies with these files, in
// front of the real homeserver with the configuration from there, and the commands of the pages about calls.
package install

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/postgres"
)

const (
	// docs is the folder of the documents.
	docs = "../../docs/"
	// secret is the registration secret in these files.
	secret = "a-third-long-password"
)

var binary string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "msc4140-install-")
	if err == nil {
		binary, err = homeserver.Build(context.Background(), dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	postgres.Main(m, func() { _ = os.RemoveAll(dir) })
}

// installed returns the path of a program. If the program is missing, the test is skipped. In CI, where the environment variable CI is
// set, it fails.
func installed(t *testing.T, program string) string {
	t.Helper()
	for _, name := range []string{program, "/usr/sbin/" + program} {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	if os.Getenv("CI") == "" {
		t.Skipf("NOT TESTED: %s is not installed", program)
	}
	t.Fatalf("%s is not installed", program)
	return ""
}

// adapt copies a file of the documents into a folder, with some values replaced, and returns the copy's path. It fails if a value is not in
// the file.
func adapt(t *testing.T, name, dir string, oldNew ...string) string {
	t.Helper()
	path := filepath.Join(dir, filepath.Base(name))
	write(t, path, read(t, docs+name))
	replace(t, path, oldNew...)
	return path
}

// replace replaces values in a file. It fails if a value is not in the file.
func replace(t *testing.T, path string, oldNew ...string) {
	t.Helper()
	text := read(t, path)
	for i := 0; i < len(oldNew); i += 2 {
		require.Contains(t, text, oldNew[i])
		text = strings.ReplaceAll(text, oldNew[i], oldNew[i+1])
	}
	write(t, path, text)
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	require.NoError(t, err)
	return string(data)
}

// write writes a file, and makes its folder.
func write(t *testing.T, path, text string) {
	t.Helper()
	require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
	require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
}

// start starts a homeserver with the configuration from docs/install.
func start(t *testing.T) *homeserver.Server {
	t.Helper()
	dir := t.TempDir()
	hs, err := homeserver.New(binary, dir, homeserver.Config{})
	require.NoError(t, err)
	adapt(t, "install/dendrite.yaml", dir,
		"postgresql://dendrite:a-long-password@127.0.0.1/dendrite?sslmode=disable", postgres.NewDatabase(t),
		"/etc/dendrite", dir, "/var/lib/dendrite", dir)
	require.NoError(t, hs.Start(t.Context()))
	t.Cleanup(hs.Kill)
	return hs
}

// address returns the address that a server listens on.
func address(t *testing.T, serverURL string) string {
	t.Helper()
	u, err := url.Parse(serverURL)
	require.NoError(t, err)
	return u.Host
}

// systemd accepts the units, and each unit restricts its server.
func TestUnit(t *testing.T) {
	analyze := installed(t, "systemd-analyze")
	for unit, program := range map[string]string{
		"install/dendrite.service":              "/opt/dendrite/bin/dendrite",
		"element-call/livekit.service":          "/usr/local/bin/livekit-server",
		"lk-jwt-service/lk-jwt-service.service": "/usr/local/bin/lk-jwt-service",
	} {
		unit := adapt(t, unit, t.TempDir(), program, binary)
		// The threshold is in tenths: 0 is no exposure, 100 the greatest.
		for _, args := range [][]string{{"verify"}, {"security", "--offline=true", "--threshold=15"}} {
			out, err := exec.CommandContext(t.Context(), analyze, append(args, unit)...).CombinedOutput()
			require.NoError(t, err, "%s", out)
			if args[0] == "verify" {
				require.Empty(t, string(out))
			}
		}
	}
}
