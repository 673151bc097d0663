package integration

import (
	"cmp"
	"database/sql"
	"fmt"
	"path/filepath"
	"slices"
	"testing"

	"github.com/matrix-org/dendrite/internal/sqlutil"
	"github.com/matrix-org/dendrite/setup/config"
	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/storage"
)

// timers returns the timers in a server's database, in the order of their deadlines.
func (s *server) timers(t *testing.T) (rows []expiration.Timer) {
	t.Helper()
	s.database(t, "expiration", func(cm *sqlutil.Connections, options *config.DatabaseOptions) {
		store, err := storage.Open(t.Context(), cm, options)
		require.NoError(t, err)
		var nids []int64
		require.NoError(t, store.Index(t.Context(), func(row expiration.Indexed) error {
			nids = append(nids, row.NID)
			return nil
		}))
		found, err := store.Read(t.Context(), nids)
		require.NoError(t, err)
		for _, row := range found {
			if row != nil { // the row may be gone if the server runs
				rows = append(rows, *row)
			}
		}
	})
	slices.SortFunc(rows, func(a, b expiration.Timer) int { return a.Deadline.Compare(b.Deadline) })
	return rows
}

// roomEvent is an event in the roomserver's database.
type roomEvent struct {
	id      string
	nid     int64 // its place in the order in which the roomserver stored events
	depth   int64
	sent    bool // false if the event is stored but not sent
	json    gjson.Result
	closes  string // the ID of the original, if this is a closing event
	running bool
}

// state returns type and state key of a state event, or "" for another event.
func (e roomEvent) state() string {
	if !e.json.Get("state_key").Exists() {
		return ""
	}
	return e.json.Get("type").Str + "|" + e.json.Get("state_key").Str
}

// place returns the room, and type and state key if the event is a state event.
func (e roomEvent) place() string { return e.json.Get("room_id").Str + "|" + e.state() }

func (e roomEvent) String() string {
	return fmt.Sprintf("%s (depth %d, at %d, sent: %t, upon %s)", e.id, e.depth, e.timestamp(), e.sent, e.json.Get("prev_events").Raw)
}

// after reports whether the other event is an ancestor of this one.
func (e roomEvent) after(other roomEvent, byID map[string]roomEvent) bool {
	ancestors, seen := []roomEvent{e}, map[string]bool{}
	for len(ancestors) > 0 {
		next := ancestors[0]
		ancestors = ancestors[1:]
		if next.depth <= other.depth {
			continue
		}
		for _, prev := range next.json.Get("prev_events").Array() {
			if prev.Str == other.id {
				return true
			}
			if !seen[prev.Str] {
				seen[prev.Str] = true
				ancestors = append(ancestors, byID[prev.Str])
			}
		}
	}
	return false
}

func (e roomEvent) timestamp() int64 { return e.json.Get("origin_server_ts").Int() }

// events returns all events in the roomserver's database, the lowest depth first. The server should not run. What clients see may be
// behind, and after a crash in another order.
func (s *server) events(t *testing.T) (events []roomEvent) {
	t.Helper()
	s.database(t, "roomserver", func(cm *sqlutil.Connections, options *config.DatabaseOptions) {
		db, _, err := cm.Connection(options)
		require.NoError(t, err)
		rows, err := db.QueryContext(t.Context(), "SELECT e.event_id, e.event_nid, e.depth, e.sent_to_output, j.event_json"+
			" FROM roomserver_events e JOIN roomserver_event_json j ON j.event_nid = e.event_nid")
		require.NoError(t, err)
		defer rows.Close()
		for rows.Next() {
			var (
				e    roomEvent
				data sql.RawBytes
			)
			require.NoError(t, rows.Scan(&e.id, &e.nid, &e.depth, &e.sent, &data))
			e.json = gjson.Parse(string(data))
			switch e.json.Get(`content.m\.will_expire`).Str {
			case "running":
				e.running = true
			case "expired", "ended":
				e.closes = e.json.Get(`content.m\.relates_to.event_id`).Str
			}
			events = append(events, e)
		}
		require.NoError(t, rows.Err())
	})
	slices.SortFunc(events, func(a, b roomEvent) int { return cmp.Compare(a.depth, b.depth) })
	return events
}

// database calls f with the means to open one of the databases of a stopped server.
func (s *server) database(t *testing.T, name string, f func(*sqlutil.Connections, *config.DatabaseOptions)) {
	t.Helper()
	dsn := s.cfg.Postgres
	switch {
	case name == "expiration" && s.cfg.ExpirationDatabase != "":
		dsn = s.cfg.ExpirationDatabase
	case dsn == "":
		dsn = "file:" + filepath.Join(s.Dir, "dendrite_"+name+".db")
	}
	options := &config.DatabaseOptions{ConnectionString: config.DataSource(dsn)}
	options.Defaults(10)
	// A connection manager with a process context would close the connections itself, at a time of its own.
	cm := sqlutil.NewConnectionManager(nil, config.DatabaseOptions{})
	db, _, err := cm.Connection(options)
	require.NoError(t, err)
	defer db.Close()
	f(cm, options)
}
