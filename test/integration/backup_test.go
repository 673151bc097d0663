//go:build all

package integration

import (
	"context"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
)

// The commands in docs/operations.md make copies of a running server and of a stopped one. A server started on the copy continues with all
// timers. A stopped server leaves complete database files without write-ahead logs.
func TestBackups(t *testing.T) {
	if _, err := exec.LookPath("sqlite3"); err != nil && os.Getenv("CI") == "" {
		t.Skipf("NOT TESTED: %s", err)
	}
	doc, err := os.ReadFile("../../docs/operations.md")
	require.NoError(t, err)
	_, section, found := strings.Cut(string(doc), "\n## Backup\n")
	require.True(t, found)
	commands := shellBlock.FindAllStringSubmatch(section, -1)
	require.Len(t, commands, 3)
	for name, test := range map[string]struct {
		commands string
		stopped  bool
	}{"Stopped": {commands[0][1], true}, "Running": {commands[1][1], false}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testBackup(t, test.commands, test.stopped)
		})
	}
}

func testBackup(t *testing.T, commands string, stopped bool) {
	s := start(t, homeserver.Config{})
	alice := s.newUser(t)
	roomID := s.room(t, alice)
	expiring := alice.sendState(t, roomID, "x", 600, nil)
	due := alice.sendMessage(t, roomID, patience.Life(8))
	res := alice.must(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message")+delayParameter+"600000",
		JSON{"msgtype": "m.text", "body": "later"})
	delayID := res.Get("delay_id").Str
	require.NotEmpty(t, delayID)
	alice.event(t, roomID, due.eventID) // the event has reached all of Dendrite's components
	if stopped {
		// A running request does not delay the stop.
		since := alice.follow(t, roomID).since
		go func() {
			_, _ = alice.Do(context.Background(), http.MethodGet, syncPath+"?timeout=30000&since="+url.QueryEscape(since), nil)
		}()
		require.NoError(t, s.Stop())
		for _, pattern := range []string{"*-wal", "*-shm", "*-journal"} {
			left, err := filepath.Glob(filepath.Join(s.Dir, pattern))
			require.NoError(t, err)
			require.Empty(t, left)
		}
	}
	dir := t.TempDir()
	require.NoError(t, os.Symlink(s.Dir, filepath.Join(dir, "data")))
	bash := exec.CommandContext(t.Context(), "bash", "-eu", "-c", commands)
	bash.Dir = dir
	output, err := bash.CombinedOutput()
	require.NoError(t, err, "%s", output)
	if !stopped {
		s.Kill() // otherwise both servers would send the events
	}

	hs, err := homeserver.New(binary, t.TempDir(), homeserver.Config{})
	require.NoError(t, err)
	config, err := os.ReadFile(filepath.Join(hs.Dir, "dendrite.yaml"))
	require.NoError(t, err)
	for _, name := range []string{"dendrite.yaml", "matrix_key.pem"} {
		require.NoError(t, os.Remove(filepath.Join(hs.Dir, name)))
	}
	require.NoError(t, os.CopyFS(hs.Dir, os.DirFS(filepath.Join(dir, "backup"))))
	require.NoError(t, os.WriteFile(filepath.Join(hs.Dir, "dendrite.yaml"), config, 0o600)) // this server has other paths
	require.NoError(t, hs.Start(t.Context()))
	t.Cleanup(hs.Kill)
	restored := &server{Server: hs}
	there := &user{&homeserver.Client{URL: hs.URL, Token: alice.Token, UserID: alice.UserID}, restored}
	restored.refreshed(t, expiring.token)
	there.must(t, http.MethodPost, "/_matrix/client/unstable/org.matrix.msc4140/delayed_events/"+delayID, JSON{"action": "send"})
	f := there.follow(t, roomID)
	f.patience = 2 * soon
	f.awaitClosing(t, due.eventID, "expired")
	f.await(t, "the delayed event", func(e gjson.Result) bool { return e.Get("content.body").Str == "later" })
	require.NoError(t, hs.Stop())
}
