package integration

import (
	"bufio"
	"bytes"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
)

// metric returns the sum of a metric with the given labels, or 0 if there is none yet.
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

// docs/protocol.md, section 6, and the operator's view.

func TestMetrics(t *testing.T) {
	t.Parallel()
	s := start(t, homeserver.Config{})
	alice := s.newUser(t)
	roomID := s.room(t, alice)
	expired, ended := alice.sendMessage(t, roomID, patience.Life(4)), alice.sendMessage(t, roomID, 600)
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

// A client that never completes its request does not prevent the server from stopping. It does not prevent complete database files either.
func TestStopDespiteAnEndlessRequest(t *testing.T) {
	t.Parallel()
	s := start(t, homeserver.Config{})
	alice := s.newUser(t)
	roomID := s.room(t, alice)
	alice.sendMessage(t, roomID, 600)
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.URL, "http://"))
	require.NoError(t, err)
	defer conn.Close()
	_, err = fmt.Fprintf(conn, "PUT %s HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %s\r\nContent-Length: 100\r\n\r\n{",
		homeserver.SendPath(roomID, "m.room.message"), alice.Token)
	require.NoError(t, err)
	alice.must(t, http.MethodGet, syncPath, nil) // shows that the server is already handling the previous request
	require.NoError(t, s.Stop())
	left, err := filepath.Glob(filepath.Join(s.Dir, "*.db-*"))
	require.NoError(t, err)
	require.Empty(t, left)
}
