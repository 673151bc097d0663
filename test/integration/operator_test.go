package integration

import (
	"bufio"
	"bytes"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/postgres"
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

// The database goes away and comes back: no false promise, nothing lost, nobody has to do anything.
func TestDatabaseOutage(t *testing.T) {
	postgres.Shared(t)                          // is there one at all?
	cluster, err := postgres.Start(t.Context()) // of its own: other tests go on
	require.NoError(t, err)
	t.Cleanup(cluster.Stop)
	dsn, err := cluster.NewDatabase(t.Context())
	require.NoError(t, err)
	s := start(t, homeserver.Config{Postgres: dsn})
	alice := s.newUser(t)
	roomID := s.room(t, alice)
	health := func() homeserver.Response {
		res, err := s.Anonymous().Do(t.Context(), http.MethodGet, "/_dendrite/monitor/health", nil)
		require.NoError(t, err)
		return res
	}
	require.Equal(t, http.StatusOK, health().Code)
	expiring, held := alice.sendState(t, roomID, "expiring", 3, nil), alice.sendState(t, roomID, "held", 600, nil)
	// Dendrite's own consumers panic if the database goes while they write.
	alice.event(t, roomID, held.eventID)

	cluster.Pause()
	res := health()
	require.Equal(t, http.StatusServiceUnavailable, res.Code)
	require.Contains(t, res.Get("warnings").Raw, "expiration: cannot reach the database")
	for _, method := range []string{"refresh", "end"} {
		code, _ := s.keepAlive(t, method, held.token)
		require.GreaterOrEqual(t, code, 500, "a false promise")
	}
	<-time.After(4 * time.Second) // the deadline passes meanwhile
	require.NoError(t, cluster.Resume(t.Context()))

	eventually(t, "health", func() bool { return health().Code == http.StatusOK })
	s.refreshed(t, held.token)
	alice.follow(t, roomID).awaitClosing(t, expiring.eventID, "expired")
	require.Len(t, alice.closings(t, roomID, expiring.eventID), 1)
	code, errcode := s.keepAlive(t, "end", held.token)
	require.Equal(t, http.StatusOK, code, errcode)
}
