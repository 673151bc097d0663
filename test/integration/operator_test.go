package integration

import (
	"bufio"
	"bytes"
	"context"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// metric returns the sum of a metric over the given labels, or 0 if it has none yet.
func (s *server) metric(t *testing.T, name string, labels ...string) (sum float64) {
	t.Helper()
	res, err := s.Anonymous().Do(t.Context(), http.MethodGet, "/metrics", nil)
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, res.Code)
	lines := bufio.NewScanner(bytes.NewReader(res.Body))
next:
	for lines.Scan() {
		line := lines.Text()
		if rest := strings.TrimPrefix(line, name); rest == line || (rest[0] != ' ' && rest[0] != '{') {
			continue
		}
		for _, label := range labels {
			if !strings.Contains(line, label) {
				continue next
			}
		}
		value, err := strconv.ParseFloat(line[strings.LastIndexByte(line, ' ')+1:], 64)
		require.NoError(t, err)
		sum += value
	}
	return sum
}

// Section 6 of the contract, and what an operator sees.

func TestMetrics(t *testing.T) {
	s := start(t, homeserver.Config{})
	alice := s.newUser(t)
	roomID := s.room(t, alice)
	expired, ended := alice.sendMessage(t, roomID, 4), alice.sendMessage(t, roomID, 600)
	replaced := alice.sendState(t, roomID, "x", 600, nil)
	require.EqualValues(t, 3, s.metric(t, "dendrite_expiration_running_timers"))
	s.refreshed(t, expired.token)
	code, _ := s.keepAlive(t, "end", ended.token)
	require.Equal(t, http.StatusOK, code)
	alice.must(t, http.MethodPut, homeserver.StatePath(roomID, memberType, "x"), JSON{})
	s.refused(t, replaced.token)
	alice.follow(t, roomID).awaitClosing(t, expired.eventID, "expired")
	eventually(t, "the metrics follow", func() bool { return s.metric(t, "dendrite_expiration_running_timers") == 0 })
	for _, want := range []struct {
		name   string
		labels []string
		value  float64
	}{
		{"dendrite_expiration_keep_alives_total", []string{`method="refresh"`, `result="ok"`}, 1},
		{"dendrite_expiration_keep_alives_total", []string{`method="refresh"`, `result="not_found"`}, 1},
		{"dendrite_expiration_keep_alives_total", []string{`method="end"`, `result="ok"`}, 1},
		{"dendrite_expiration_closings_total", []string{`outcome="expired"`}, 1},
		{"dendrite_expiration_closings_total", []string{`outcome="ended"`}, 1},
		{"dendrite_expiration_drops_total", []string{`reason="replaced"`}, 1},
		{"dendrite_expiration_closing_lateness_seconds_count", nil, 1},
		{"dendrite_expiration_closing_retries_total", nil, 0},
		{"dendrite_expiration_errors_total", nil, 0},
	} {
		require.Equal(t, want.value, s.metric(t, want.name, want.labels...), "%s%v", want.name, want.labels)
	}
	written, err := s.Written()
	require.NoError(t, err)
	require.Contains(t, string(written), "Closed an expiring event")
	for _, line := range strings.Split(string(written), "\n") {
		if strings.Contains(line, "level=info") {
			require.NotContains(t, line, "expiration/refresh", "a line for each keep-alive")
		}
	}
}

// What a server leaves that was told to stop is whole in the files that the documentation names: the timers are in a copy of them.
func TestCopyOfAStoppedServer(t *testing.T) {
	s := start(t, homeserver.Config{})
	alice := s.newUser(t)
	roomID := s.room(t, alice)
	expiring := alice.sendState(t, roomID, "x", 600, nil)
	due := alice.sendMessage(t, roomID, 20)
	res := alice.must(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message")+delayParameter+"600000",
		JSON{"msgtype": "m.text", "body": "later"})
	delayID := res.Get("delay_id").Str
	require.NotEmpty(t, delayID)
	// Requests that are under way when the server stops are not in its way.
	since := alice.follow(t, roomID).since
	for range 4 {
		go func() {
			_, _ = alice.Do(context.Background(), http.MethodGet, syncPath+"?timeout=30000&since="+url.QueryEscape(since), nil)
		}()
	}
	require.NoError(t, s.Stop())
	for _, pattern := range []string{"*-wal", "*-shm", "*-journal"} {
		left, err := filepath.Glob(filepath.Join(s.Dir, pattern))
		require.NoError(t, err)
		require.Empty(t, left)
	}

	hs, err := homeserver.New(binary, t.TempDir(), homeserver.Config{})
	require.NoError(t, err)
	databases, err := filepath.Glob(filepath.Join(s.Dir, "*.db"))
	require.NoError(t, err)
	require.Greater(t, len(databases), 5)
	for _, name := range append(databases, filepath.Join(s.Dir, "matrix_key.pem")) {
		data, err := os.ReadFile(name)
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(filepath.Join(hs.Dir, filepath.Base(name)), data, 0o600))
	}
	require.NoError(t, os.CopyFS(filepath.Join(hs.Dir, "jetstream"), os.DirFS(filepath.Join(s.Dir, "jetstream"))))
	require.NoError(t, hs.Start(t.Context()))
	t.Cleanup(hs.Kill)
	copied := &server{Server: hs}
	there := &user{&homeserver.Client{URL: hs.URL, Token: alice.Token, UserID: alice.UserID}, copied}
	copied.refreshed(t, expiring.token)
	there.must(t, http.MethodPost, "/_matrix/client/unstable/org.matrix.msc4140/delayed_events/"+delayID, JSON{"action": "send"})
	f := there.follow(t, roomID)
	f.patience = 2 * soon
	f.awaitClosing(t, due.eventID, "expired")
	f.await(t, "the delayed event", func(e gjson.Result) bool { return e.Get("content.body").Str == "later" })
	require.NoError(t, hs.Stop())
}
