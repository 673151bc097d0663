//go:build all

package integration

import (
	"context"
	"database/sql"
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
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/postgres"
)

// The commands in docs/operations.md back up a running server and a stopped one, and restore it after its data was lost. The restored server
// continues with all timers, and has its key, its configuration and its media. A stopped server leaves complete database files without
// write-ahead logs.
func TestBackups(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("sqlite3"); err != nil && os.Getenv("CI") == "" {
		t.Skipf("NOT TESTED: %s", err)
	}
	backup, restore := commandsIn(t, "Backup"), commandsIn(t, "Restore")
	require.Len(t, backup, 5)
	require.Len(t, restore, 2)
	folders, rest := backup[0], backup[4]
	t.Run("Stopped", func(t *testing.T) {
		t.Parallel()
		testBackup(t, "", true, folders+backup[1]+rest, restore[0])
	})
	t.Run("Running", func(t *testing.T) {
		t.Parallel()
		testBackup(t, "", false, folders+backup[2]+rest, restore[0])
	})
	t.Run("PostgreSQL", func(t *testing.T) {
		t.Parallel()
		testBackup(t, documentedDatabase(t), false, folders+backup[3]+rest, restore[0]+restore[1])
	})
}

// commandsIn returns the commands in the section of docs/operations.md with this heading, one string a block.
func commandsIn(t *testing.T, heading string) (blocks []string) {
	t.Helper()
	doc, err := os.ReadFile("../../docs/operations.md")
	require.NoError(t, err)
	_, section, found := strings.Cut(string(doc), "\n## "+heading+"\n")
	require.True(t, found)
	section, _, _ = strings.Cut(section, "\n## ")
	for _, block := range shellBlock.FindAllStringSubmatch(section, -1) {
		blocks = append(blocks, block[1])
	}
	return blocks
}

// documentedDatabase makes an empty database with the name that the documents use. It returns the database's connection string.
func documentedDatabase(t *testing.T) string {
	t.Helper()
	other, err := url.Parse(postgres.NewDatabase(t))
	require.NoError(t, err)
	db, err := sql.Open("postgres", other.String())
	require.NoError(t, err)
	defer db.Close()
	for _, command := range []string{"DROP DATABASE IF EXISTS dendrite", "CREATE DATABASE dendrite"} {
		_, err = db.ExecContext(t.Context(), command)
		require.NoError(t, err)
	}
	other.Path = "/dendrite"
	return other.String()
}

func testBackup(t *testing.T, database string, stopped bool, backup, restore string) {
	s := start(t, homeserver.Config{Postgres: database})
	alice := s.newUser(t)
	roomID := s.room(t, alice)
	expiring := alice.sendState(t, roomID, "x", 600, nil)
	due := alice.sendMessage(t, roomID, patience.Life(8))
	res := alice.must(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message")+delayParameter+"600000",
		JSON{"msgtype": "m.text", "body": "later"})
	delayID := res.Get("delay_id").Str
	require.NotEmpty(t, delayID)
	res = alice.must(t, http.MethodPost, "/_matrix/media/v3/upload", JSON{"a": "file"})
	media := "/_matrix/media/v3/download/" + strings.TrimPrefix(res.Get("content_uri").Str, "mxc://")
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

	// The commands run beside the data, and are given its folder as an operator gives it. Instead of the machine's PostgreSQL they get
	// the test's.
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "runuser"), []byte("#!/bin/sh\nshift 3\nexec \"$@\"\n"), 0o700))
	env := append(os.Environ(), "DATA="+s.Dir, "CONF="+s.Dir, "PATH="+dir+":"+os.Getenv("PATH"))
	if database != "" {
		dsn, err := url.Parse(database)
		require.NoError(t, err)
		env = append(env, "PGHOST="+dsn.Hostname(), "PGPORT="+dsn.Port(), "PGUSER="+dsn.User.Username())
	}
	run := func(commands string) {
		t.Helper()
		bash := exec.CommandContext(t.Context(), "bash", "-eu", "-c", commands)
		bash.Dir, bash.Env = dir, env
		output, err := bash.CombinedOutput()
		require.NoError(t, err, "%s", output)
	}
	const folders = "DATA=data CONF=data "
	require.Contains(t, backup, folders)
	run(strings.Replace(backup, folders, "", 1))
	if !stopped {
		s.Kill()
	}
	files, err := os.ReadDir(s.Dir)
	require.NoError(t, err)
	for _, file := range files {
		if name := filepath.Join(s.Dir, file.Name()); !file.IsDir() {
			require.NoError(t, os.WriteFile(name, []byte("lost"), 0o600))
		}
	}
	run(restore)

	require.NoError(t, s.Start(t.Context()))
	s.refreshed(t, expiring.token)
	alice.must(t, http.MethodGet, media, nil)
	alice.must(t, http.MethodPost, "/_matrix/client/unstable/org.matrix.msc4140/delayed_events/"+delayID, JSON{"action": "send"})
	f := alice.follow(t, roomID)
	f.patience = 2 * soon
	f.awaitClosing(t, due.eventID, "expired")
	f.await(t, "the delayed event", func(e gjson.Result) bool { return e.Get("content.body").Str == "later" })
	require.NoError(t, s.Stop())
}
