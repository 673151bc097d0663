package hostile

import (
	"bytes"
	"database/sql"
	"os"
	"slices"
	"strconv"
	"testing"

	_ "github.com/lib/pq" // the driver that Dendrite uses
	"github.com/stretchr/testify/require"
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

// memory returns how much memory a process has resident, and the most that it ever had, in bytes.
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
