//go:build all

package hostile

import (
	"bytes"
	"database/sql"
	"net/http"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	_ "github.com/lib/pq" // the driver that Dendrite uses
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

func sorted(s []string) []string {
	slices.Sort(s)
	return s
}

// databaseSize returns the size of a PostgreSQL database in bytes.
func databaseSize(t *testing.T, dsn string) (size int64) {
	t.Helper()
	db, err := sql.Open("postgres", dsn)
	require.NoError(t, err)
	defer db.Close()
	require.NoError(t, db.QueryRowContext(t.Context(), "SELECT pg_database_size(current_database())").Scan(&size))
	return size
}

// memory returns the resident memory of a process, now and at its peak, in bytes.
func memory(t *testing.T, pid int) (now, most int64) {
	t.Helper()
	status, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	require.NoError(t, err)
	kilobytes := func(key string) int64 {
		for line := range bytes.Lines(status) {
			if fields := bytes.Fields(line); len(fields) > 1 && string(fields[0]) == key+":" {
				n, _ := strconv.ParseInt(string(fields[1]), 10, 64)
				return n << 10
			}
		}
		return 0
	}
	return kilobytes("VmRSS"), kilobytes("VmHWM")
}

// usualSend is how long a plain send takes on the machine that the bounds were measured on.
const usualSend = 20 * time.Millisecond

// measure sets the factor by which this machine is slower than the usual one. It is the ratio of the times of plain sends.
func (s *server) measure(t *testing.T, user *homeserver.Client) {
	t.Helper()
	room, err := user.CreateRoom(t.Context(), nil)
	require.NoError(t, err)
	took := make([]time.Duration, 50)
	for i := range took {
		before := time.Now()
		_, err := user.Do(t.Context(), http.MethodPut, homeserver.SendPath(room, "m.room.message"), JSON{"body": "x"})
		require.NoError(t, err)
		took[i] = time.Since(before)
	}
	s.factor = max(1, (quantile(took, .5)+usualSend-1)/usualSend)
	t.Logf("this machine is slower than the usual one by a factor of %d", s.factor)
}

// lateness returns the bound for a bystander's lateness. In CI it is the promised bound. Elsewhere other programs may use the machine, so
// it is multiplied by the factor.
func (s *server) lateness() time.Duration {
	if os.Getenv("CI") != "" {
		return lateness
	}
	return s.factor * lateness
}
