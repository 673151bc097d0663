package storage_test

import (
	"database/sql"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

var tables = []string{
	"expiration_timers", "expiration_deadlines", "expiration_digests", "expiration_claims", "expiration_finalised",
	"expiration_delegations", "expiration_participants",
}

// refusesOtherTables checks that tables of another version are refused and left alone, and that the error says what to do. open opens the
// store of db, which is empty.
func refusesOtherTables(t *testing.T, db *sql.DB, open func() (expiration.Store, error)) {
	exec := func(query string) {
		t.Helper()
		_, err := db.ExecContext(t.Context(), query)
		require.NoError(t, err)
	}
	dropAll := func() {
		t.Helper()
		for _, table := range tables {
			exec("DROP TABLE " + table)
		}
	}
	refused := func(why string) {
		t.Helper()
		for range 2 {
			_, err := open()
			require.ErrorContains(t, err, why)
			require.NotContains(t, err.Error(), "\n")
		}
	}
	opened := func(timers ...string) {
		t.Helper()
		for range 2 {
			store, err := open()
			require.NoError(t, err)
			require.Equal(t, timers, list(t, store))
		}
	}

	const before = "before the first release"
	exec("CREATE TABLE expiration_timers (event_id TEXT NOT NULL PRIMARY KEY)") // as in the earliest versions
	exec("INSERT INTO expiration_timers VALUES ('$event')")
	refused(before)
	var rows int
	require.NoError(t, db.QueryRowContext(t.Context(), "SELECT COUNT(*) FROM expiration_timers").Scan(&rows))
	require.Equal(t, 1, rows)
	exec("DROP TABLE expiration_timers")
	opened()

	store, err := open()
	require.NoError(t, err)
	require.NoError(t, tryInsert(t.Context(), store, newTimer(1)))
	opened("$event1")
	exec("DROP TABLE expiration_schema") // the last version before the first release had all other tables
	refused(before)
	exec("DROP TABLE expiration_timers")
	refused(before) // some of the tables are left
	exec("CREATE TABLE expiration_timers (event_id TEXT)")
	dropAll()
	opened()

	for _, version := range []string{"1", "2"} {
		exec("UPDATE expiration_schema SET version = " + version)
		refused(before)
	}
	exec("UPDATE expiration_schema SET version = 4")
	refused("its tables have version 4, and this server needs version 3")
	exec("UPDATE expiration_schema SET version = 3")
	dropAll() // keeps expiration_schema, which an operator may forget to drop
	opened()
}
