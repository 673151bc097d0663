package integration

import (
	"context"
	"database/sql"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/matrix-org/dendrite/internal/sqlutil"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// A server without a configuration file creates its data folder. The next start uses it again.
func TestDataFolder(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "with space", "data")
	hs, err := homeserver.NewInHome(binary, dir)
	require.NoError(t, err)
	require.NoError(t, hs.Start(t.Context()))
	t.Cleanup(hs.Kill)
	for _, name := range []string{"dendrite.yaml", "matrix_key.pem", "dendrite_expiration.db", "jetstream"} {
		info, err := os.Stat(filepath.Join(dir, name))
		require.NoError(t, err)
		require.Zero(t, info.Mode().Perm()&0o077, "%s is readable for others", name)
	}
	config, err := os.ReadFile(filepath.Join(dir, "dendrite.yaml"))
	require.NoError(t, err)
	_, secret, _ := strings.Cut(string(config), "registration_shared_secret: ")
	secret, _, _ = strings.Cut(secret, "\n")
	client, err := homeserver.RegisterAt(t.Context(), hs.URL, secret, "alice")
	require.NoError(t, err)
	alice := &user{client, &server{Server: hs}}
	require.Equal(t, "@alice:localhost", alice.UserID)
	roomID := alice.s.room(t, alice)
	sent := alice.sendState(t, roomID, "x", 600, nil)

	out, err := os.ReadFile(filepath.Join(dir, "output"))
	require.NoError(t, err)
	for _, want := range []string{strings.TrimPrefix(hs.URL, "http://"), dir, "create-account"} {
		require.Contains(t, string(out), want)
	}
	require.NoError(t, hs.Stop())
	require.NoError(t, hs.Start(t.Context()))
	alice.s.refreshed(t, sent.token)
	eventually(t, "a welcome that does not say again how to make the first user", func() bool {
		said, err := os.ReadFile(filepath.Join(dir, "output"))
		require.NoError(t, err)
		welcome := string(said[len(out):])
		return strings.Contains(welcome, "Ctrl-C stops") && !strings.Contains(welcome, "create-account")
	})
	again, err := os.ReadFile(filepath.Join(dir, "dendrite.yaml"))
	require.NoError(t, err)
	require.Equal(t, string(config), string(again))

	// A second server on the same data is refused.
	requireFails(t, "in use by another server", "--data", dir, "--http-bind-address", "127.0.0.1:0")
}

// requireFails runs the homeserver, which must end with code 1 and a single line that contains the given text.
func requireFails(t *testing.T, says string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, args...)
	cmd.Dir = t.TempDir()
	out, err := cmd.CombinedOutput()
	require.Error(t, err, "%s", out)
	require.Equal(t, 1, cmd.ProcessState.ExitCode(), "%s", out)
	var lines []string
	for _, line := range strings.Split(strings.TrimSpace(string(out)), "\n") {
		// Dendrite always prints these lines.
		if !strings.Contains(line, "level=info") && !strings.Contains(line, "level=warning") {
			lines = append(lines, line)
		}
	}
	require.Len(t, lines, 1, "%s", out)
	require.Contains(t, lines[0], says)
	require.NotContains(t, string(out), "goroutine ")
}

// With this flag the binary prints its version and does nothing else.
func TestVersion(t *testing.T) {
	t.Parallel()
	cmd := exec.CommandContext(t.Context(), binary, "--version")
	cmd.Dir = t.TempDir()
	out, err := cmd.CombinedOutput()
	require.NoError(t, err)
	require.Regexp(t, `^`+regexp.QuoteMeta(msc4140.Version)+` \(Dendrite \d+\.\d+\.\d+\)(, commit [0-9a-f]{40}(, modified)?)?\n$`, string(out))
	left, err := os.ReadDir(cmd.Dir)
	require.NoError(t, err)
	require.Empty(t, left)
}

func TestStartFailures(t *testing.T) {
	t.Parallel()
	t.Run("TakenPort", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		defer l.Close()
		requireFails(t, "address already in use", "--data", t.TempDir(), "--http-bind-address", l.Addr().String())
	})
	t.Run("DataFolderIsAFile", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "file")
		require.NoError(t, os.WriteFile(file, nil, 0o600))
		requireFails(t, file, "--data", file)
		requireFails(t, file, "--data", filepath.Join(file, "below"))
	})
	t.Run("NoSuchConfiguration", func(t *testing.T) {
		requireFails(t, "no such file", "--config", filepath.Join(t.TempDir(), "dendrite.yaml"))
	})
	t.Run("BothDataAndConfiguration", func(t *testing.T) {
		requireFails(t, "exclude each other", "--config", "dendrite.yaml", "--data", "data")
	})
	t.Run("Argument", func(t *testing.T) {
		requireFails(t, "did you mean --config dendrite.yaml?", "dendrite.yaml", "--http-bind-address", "127.0.0.1:0")
	})
	configured := func(t *testing.T, change func(config string) string) []string {
		hs, err := homeserver.New(binary, t.TempDir(), homeserver.Config{Expiration: JSON{}})
		require.NoError(t, err)
		name := filepath.Join(hs.Dir, "dendrite.yaml")
		config, err := os.ReadFile(name)
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(name, []byte(change(string(config))), 0o600))
		return []string{"--config", name, "--really-enable-open-registration", "--http-bind-address", "127.0.0.1:0"}
	}
	t.Run("NotYAML", func(t *testing.T) {
		requireFails(t, "yaml", configured(t, func(string) string { return "a: [" })...)
	})
	t.Run("NoKey", func(t *testing.T) {
		requireFails(t, "private_key", configured(t, func(c string) string { return strings.Replace(c, "matrix_key", "other_key", 1) })...)
	})
	t.Run("FolderOfADatabaseIsMissing", func(t *testing.T) {
		requireFails(t, "cannot write a database", configured(t, func(c string) string {
			return strings.Replace(c, "dendrite_syncapi.db", "missing/dendrite_syncapi.db", 1)
		})...)
	})
	t.Run("TablesFromBeforeTheFirstRelease", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "expiration.db")
		db, err := sql.Open(sqlutil.SQLITE_DRIVER_NAME, file)
		require.NoError(t, err)
		_, err = db.ExecContext(t.Context(), "CREATE TABLE expiration_timers (event_id TEXT)")
		require.NoError(t, err)
		require.NoError(t, db.Close())
		requireFails(t, "from before the first release", configured(t, func(c string) string {
			return strings.Replace(c, "expiration: {}", "expiration: {database: {connection_string: 'file:"+file+"'}}", 1)
		})...)
	})
	t.Run("NoPostgreSQL", func(t *testing.T) {
		requireFails(t, "connect", configured(t, func(c string) string {
			return strings.Replace(c, "global:\n", "global:\n  database: {connection_string: \"postgres://nobody@127.0.0.1:1/none?sslmode=disable\"}\n", 1) +
				"\nroom_server: {database: {connection_string: \"\"}}\n"
		})...)
	})
	for section, says := range map[string]string{
		"{max_durations: 1h}":                               `: unknown config key "max_durations" (the keys there are database, max_duration, `,
		"{rate_limiting: {token: {treshold: 1}}}":           `unknown config key "treshold" (the keys there are threshold, cooloff_ms)`,
		"{max_duration: 500ms}":                             `"expiration.max_duration"`,
		"{max_duration: 1500ms}":                            `"expiration.max_duration"`,
		"{max_duration: 10000h}":                            `"expiration.max_duration"`,
		"{max_duration: long}":                              `"max_duration": long (must be a duration with its unit, `,
		"{max_duration: 3600}":                              `"max_duration": 3600 (must be a duration with its unit, such as 3600s or 1h)`,
		"{max_running_per_user: 0}":                         `"expiration.max_running_per_user"`,
		"{max_running_per_user: 1000000000000000000}":       `"expiration.max_running_per_user": 1000000000000000000 (must be from 1 to 1000000)`,
		"{restart_grace: -1s}":                              `"expiration.restart_grace"`,
		"{restart_grace: 2h}":                               `"expiration.restart_grace"`,
		"{rate_limiting: {token: {threshold: 0}}}":          `"expiration.rate_limiting.token.threshold"`,
		"{rate_limiting: {unknown_token: {cooloff_ms: 0}}}": `"expiration.rate_limiting.unknown_token.cooloff_ms"`,
		"[]":                `"expiration": a list (must be a section`,
		"{a: 1, b: {c: 2}}": `unknown config key "b" (the keys there`,
		"{max_running_per_user: 0, restart_grace: -1s}":         `"expiration.restart_grace"`,
		"{max_running_per_user: many}":                          `"max_running_per_user": many (must be a whole number)`,
		"{rate_limiting: 5}":                                    `"rate_limiting": 5 (must be a section`,
		"{rate_limiting: {enabled: 5}}":                         `"enabled": 5 (must be true or false)`,
		"{}\nexpiration: {}":                                    `config key "expiration" is there for the second time`,
		"{}\nexpirations: {}":                                   `unknown config key "expirations" (did you mean "expiration"?)`,
		"{database: {connection_string: 'file:/nowhere/x.db'}}": `cannot write a database`,
	} {
		t.Run(section, func(t *testing.T) {
			requireFails(t, says, configured(t, func(c string) string {
				return strings.Replace(c, "expiration: {}", "expiration: "+section, 1)
			})...)
		})
	}
}

// With all streams in memory there is no folder for streams. A second server on the same timers is refused all the same.
func TestStreamsInMemory(t *testing.T) {
	t.Parallel()
	hs, err := homeserver.New(binary, t.TempDir(), homeserver.Config{})
	require.NoError(t, err)
	name := filepath.Join(hs.Dir, "dendrite.yaml")
	config, err := os.ReadFile(name)
	require.NoError(t, err)
	config = regexp.MustCompile(`storage_path: .*jetstream`).ReplaceAll(config, []byte("in_memory: true"))
	require.Contains(t, string(config), "in_memory: true")
	require.NoError(t, os.WriteFile(name, config, 0o600))
	require.NoError(t, hs.Start(t.Context()))
	t.Cleanup(hs.Kill)
	s := &server{Server: hs}
	alice := s.newUser(t)
	sent := alice.sendMessage(t, s.room(t, alice), 600)
	s.refreshed(t, sent.token)
	requireFails(t, "in use by another server",
		"--config", name, "--really-enable-open-registration", "--http-bind-address", "127.0.0.1:0")
	require.NoError(t, hs.Stop())
}

// If a write-ahead log belongs to another user, SQLite allows reads but refuses writes. The server notices that at its start.
func TestLogOfSomebodyElse(t *testing.T) {
	t.Parallel()
	for _, beside := range []string{"-wal", "-shm"} {
		t.Run(beside, func(t *testing.T) {
			hs, err := homeserver.New(binary, t.TempDir(), homeserver.Config{})
			require.NoError(t, err)
			name := filepath.Join(hs.Dir, "dendrite_expiration.db"+beside)
			require.NoError(t, os.WriteFile(name, nil, 0o400))
			run := exec.CommandContext(t.Context(), binary,
				"--config", filepath.Join(hs.Dir, "dendrite.yaml"), "--really-enable-open-registration", "--http-bind-address", "127.0.0.1:0")
			if os.Geteuid() == 0 { // root may write every file
				asNobody(t, run, hs.Dir)
				require.NoError(t, os.Chown(name, 0, 0))
			}
			out, err := run.CombinedOutput()
			require.Error(t, err, "%s", out)
			require.Equal(t, 1, run.ProcessState.ExitCode(), "%s", out)
			require.Contains(t, string(out), "cannot write a database: open "+name+": permission denied")
		})
	}
}

// asNobody makes a command run as a user who owns only the given folder and its files.
func asNobody(t *testing.T, cmd *exec.Cmd, dir string) {
	t.Helper()
	const nobody = 65534
	require.NoError(t, filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if err == nil {
			err = os.Chown(path, nobody, nobody)
		}
		return err
	}))
	// The folders above the given one, and the binary, belong to root.
	require.NoError(t, os.Chmod(filepath.Dir(dir), 0o711))
	program, err := os.ReadFile(cmd.Path)
	require.NoError(t, err)
	cmd.Path = filepath.Join(dir, "program")
	require.NoError(t, os.WriteFile(cmd.Path, program, 0o755))
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
}

// A flag of stock Dendrite works: the server listens on a unix socket.
func TestUnixSocket(t *testing.T) {
	t.Parallel()
	hs, err := homeserver.New(binary, t.TempDir(), homeserver.Config{})
	require.NoError(t, err)
	socket := filepath.Join(hs.Dir, "socket")
	cmd := exec.CommandContext(t.Context(), binary, "--config", filepath.Join(hs.Dir, "dendrite.yaml"),
		"--really-enable-open-registration", "--unix-socket", socket, "--unix-socket-permission", "700")
	require.NoError(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	client := &homeserver.Client{URL: "http://unix", HTTP: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}}
	eventually(t, "an answer", func() bool {
		res, err := client.Do(t.Context(), http.MethodGet, "/_matrix/client/versions", nil)
		return err == nil && res.Code == http.StatusOK
	})
	res, err := client.KeepAlive(t.Context(), "refresh", "x")
	require.NoError(t, err)
	require.Equal(t, http.StatusNotFound, res.Code)
}
