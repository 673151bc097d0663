// Package sqlite3 keeps timers in an SQLite database.
package sqlite3

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/matrix-org/dendrite/internal/sqlutil"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/storage/shared"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/guard"
)

const createTimersSQL = `
CREATE TABLE expiration_timers (
	event_id TEXT NOT NULL PRIMARY KEY,
	room_id TEXT NOT NULL,
	event_type TEXT NOT NULL,
	-- NULL for events that are not state
	state_key TEXT,
	-- the full user ID
	sender TEXT NOT NULL,
	-- SHA-256 of the refresh token
	token_hash BLOB NOT NULL,
	duration_ms INTEGER NOT NULL,
	received_ms INTEGER NOT NULL,
	deadline_ms INTEGER NOT NULL,
	-- NULL while the timer runs; set together once it is claimed
	outcome TEXT,
	closing_event_id TEXT,
	closing_room_version TEXT,
	closing_pdu BLOB
)`

// NULL for events that are not sent with a transaction ID
const addRequestsSQL = `
ALTER TABLE expiration_timers ADD COLUMN request_hash BLOB;
ALTER TABLE expiration_timers ADD COLUMN room_version TEXT;
ALTER TABLE expiration_timers ADD COLUMN pdu BLOB`

// SQLite cannot change the primary key of a table.
const numberTimersSQL = `
CREATE TABLE expiration_timers_numbered (
	timer_nid INTEGER NOT NULL PRIMARY KEY,
	event_id TEXT NOT NULL UNIQUE,
	room_id TEXT NOT NULL,
	event_type TEXT NOT NULL,
	state_key TEXT,
	sender TEXT NOT NULL,
	token_hash BLOB NOT NULL,
	duration_ms INTEGER NOT NULL,
	received_ms INTEGER NOT NULL,
	deadline_ms INTEGER NOT NULL,
	outcome TEXT,
	closing_event_id TEXT,
	closing_room_version TEXT,
	closing_pdu BLOB,
	request_hash BLOB,
	room_version TEXT,
	pdu BLOB
);
INSERT INTO expiration_timers_numbered SELECT rowid, * FROM expiration_timers;
DROP TABLE expiration_timers;
ALTER TABLE expiration_timers_numbered RENAME TO expiration_timers`

// content is NULL for expiring events, and event_id the row's own ID for the others. What was finalised is kept in the order in
// which that happened.
const addDelayedSQL = `
ALTER TABLE expiration_timers RENAME COLUMN closing_event_id TO sent_event_id;
ALTER TABLE expiration_timers RENAME COLUMN closing_room_version TO sent_room_version;
ALTER TABLE expiration_timers RENAME COLUMN closing_pdu TO sent_pdu;
ALTER TABLE expiration_timers ADD COLUMN content BLOB;
ALTER TABLE expiration_timers ADD COLUMN expires_ms INTEGER NOT NULL DEFAULT 0;
ALTER TABLE expiration_timers ADD COLUMN origin_server_ts INTEGER NOT NULL DEFAULT 0;
ALTER TABLE expiration_timers ADD COLUMN over_event_id TEXT NOT NULL DEFAULT '';
CREATE UNIQUE INDEX expiration_timers_request ON expiration_timers (request_hash) WHERE content IS NOT NULL;
CREATE TABLE expiration_finalised (
	finalised_nid INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
	row_id TEXT NOT NULL,
	room_id TEXT NOT NULL,
	event_type TEXT NOT NULL,
	state_key TEXT,
	sender TEXT NOT NULL,
	token_hash BLOB NOT NULL UNIQUE,
	duration_ms INTEGER NOT NULL,
	received_ms INTEGER NOT NULL,
	deadline_ms INTEGER NOT NULL,
	request_hash BLOB,
	content BLOB NOT NULL,
	finalised_ms INTEGER NOT NULL,
	event_id TEXT,
	error TEXT
);` + shared.FinalisedIndexesSQL

const splitTimersSQL = `
CREATE TABLE expiration_deadlines (
	timer_nid INTEGER NOT NULL PRIMARY KEY,
	duration_ms INTEGER NOT NULL,
	deadline_ms INTEGER NOT NULL,
	-- NULL while the timer runs
	outcome TEXT
);
INSERT INTO expiration_deadlines SELECT timer_nid, duration_ms, deadline_ms, outcome FROM expiration_timers;
CREATE TABLE expiration_claims (
	timer_nid INTEGER NOT NULL PRIMARY KEY,
	event_id TEXT NOT NULL,
	room_version TEXT NOT NULL,
	pdu BLOB NOT NULL
);
INSERT INTO expiration_claims SELECT timer_nid, sent_event_id, sent_room_version, sent_pdu FROM expiration_timers
	WHERE outcome IS NOT NULL;
ALTER TABLE expiration_timers DROP COLUMN duration_ms;
ALTER TABLE expiration_timers DROP COLUMN deadline_ms;
ALTER TABLE expiration_timers DROP COLUMN outcome;
ALTER TABLE expiration_timers DROP COLUMN sent_event_id;
ALTER TABLE expiration_timers DROP COLUMN sent_room_version;
ALTER TABLE expiration_timers DROP COLUMN sent_pdu`

// Timers of earlier versions have none.
const addDigestsSQL = "CREATE TABLE expiration_digests (timer_nid INTEGER NOT NULL PRIMARY KEY, digest BLOB NOT NULL)"

// Delayed events of earlier versions are not exempt.
const addExemptSQL = "ALTER TABLE expiration_timers ADD COLUMN exempt BOOLEAN NOT NULL DEFAULT FALSE"

var migrations = []shared.Migration{
	{Name: "create timers", SQL: createTimersSQL},
	{Name: "add requests", SQL: addRequestsSQL},
	{Name: "number timers", SQL: numberTimersSQL},
	{Name: "add delayed events", SQL: addDelayedSQL},
	{Name: "split timers", SQL: splitTimersSQL},
	{Name: "add digests", SQL: addDigestsSQL},
	{Name: "add exempt", SQL: addExemptSQL},
}

const (
	// pageSize is how many bytes a page of a new database has. The timers that are refreshed together mostly stand in pages of their
	// own, and each of these goes through the log whole: with SQLite's own 4096 bytes, that is most of the time of a commit.
	pageSize = 1024
	// checkpointPages is after how many pages the log is written back: four megabytes, as with SQLite's own sizes.
	checkpointPages = 4000
)

// Open prepares the database, which must not be shared with another component, and returns the store.
func Open(ctx context.Context, db *sql.DB, writer sqlutil.Writer) (*shared.Store, error) {
	if err := create(ctx, db); err != nil {
		return nil, err
	}
	if err := shared.Migrate(ctx, db, migrations...); err != nil {
		return nil, err
	}
	return &shared.Store{DB: db, Statements: &shared.Statements{DB: db}, Writer: newConnection(db, writer), Many: shared.Many{
		Among: func(column, parameter string) string {
			return column + " IN (SELECT value FROM json_each(" + parameter + "))"
		},
		Value: array,
	}}, nil
}

// create makes the database with pages of pageSize, if it is empty. One that an earlier version made keeps those it has.
func create(ctx context.Context, db *sql.DB) error {
	conn, err := db.Conn(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	return set(ctx, conn, fmt.Sprintf("page_size = %d", pageSize), writeAhead) // the second writes the first page
}

// writeAhead is the setting with which changes go to the log first.
const writeAhead = "journal_mode = WAL"

// set changes settings, of the database or of a connection.
func set(ctx context.Context, conn *sql.Conn, settings ...string) error {
	for _, setting := range settings {
		if _, err := conn.ExecContext(ctx, "PRAGMA "+setting); err != nil {
			return fmt.Errorf("setting %s: %w", setting, err)
		}
	}
	return nil
}

// connection is the one connection on which everything is written. The settings that make a commit durable belong to a
// connection, and database/sql opens and closes its own as it likes; Dendrite gives no way to set them for all.
type connection struct {
	db     *sql.DB
	writer sqlutil.Writer // runs one function at a time

	// pinging is held by the one Ping that is waiting for writer.
	pinging chan struct{}

	// Used only inside writer, and nil before the first write and after an error.
	conn    *sql.Conn
	refresh *sql.Stmt // refreshTimersSQL, which goes with conn
	closed  bool      // used only inside writer
}

func newConnection(db *sql.DB, writer sqlutil.Writer) *connection {
	return &connection{db: db, writer: writer, pinging: make(chan struct{}, 1)}
}

// errClosed is the error of a write after Close. What was to be written is not acknowledged by whoever wanted it.
var errClosed = errors.New("the database of the timers is closed")

// use calls f with the connection, one function at a time.
func (c *connection) use(ctx context.Context, f func(*sql.Conn) error) error {
	return c.writer.Do(nil, nil, func(*sql.Tx) (err error) {
		if c.closed {
			return errClosed
		}
		if c.conn == nil {
			if err = c.open(ctx); err != nil {
				return err
			}
		}
		// The writer runs this in a goroutine of its own.
		err = errPanicked
		guard.Run("writing timers", func() { err = f(c.conn) })
		if err != nil {
			c.close()
		}
		return err
	})
}

var errPanicked = errors.New("writing timers panicked")

func (c *connection) Transaction(ctx context.Context, f func(*sql.Tx) error) error {
	return c.use(ctx, func(conn *sql.Conn) error {
		txn, err := conn.BeginTx(ctx, nil)
		if err != nil {
			return err
		}
		return shared.Commit(txn, f)
	})
}

const (
	insertDigestSQL   = "INSERT INTO expiration_digests (timer_nid, digest) VALUES ($1, $2)"
	insertDeadlineSQL = "INSERT INTO expiration_deadlines (timer_nid, duration_ms, deadline_ms) VALUES ($1, $2, $3)"
)

func (c *connection) Insert(ctx context.Context, values []any, d expiration.Digest, duration, deadline int64) error {
	nid := values[0]
	return c.Transaction(ctx, func(txn *sql.Tx) error {
		for _, insert := range []struct {
			query string
			args  []any
		}{
			{shared.InsertTimerSQL, values},
			{insertDigestSQL, []any{nid, d[:]}},
			{insertDeadlineSQL, []any{nid, duration, deadline}},
		} {
			if _, err := txn.ExecContext(ctx, insert.query, insert.args...); err != nil {
				return err
			}
		}
		return nil
	})
}

const (
	deleteDeadlinesSQL = "DELETE FROM expiration_deadlines WHERE timer_nid IN (SELECT value FROM json_each($1))"
	// spareClaimedSQL is the end of the former for running timers.
	spareClaimedSQL = " AND outcome IS NULL"
	// deleteRestSQL deletes from another table what belongs to timers whose deadlines are gone.
	deleteRestSQL = "DELETE FROM %s AS t WHERE timer_nid IN (SELECT value FROM json_each($1))" +
		" AND NOT EXISTS (SELECT 1 FROM expiration_deadlines AS d WHERE d.timer_nid = t.timer_nid)"
)

func (c *connection) Remove(ctx context.Context, txn *sql.Tx, nids []int64, running bool) (n int64, err error) {
	if txn == nil {
		err = c.Transaction(ctx, func(txn *sql.Tx) error {
			n, err = c.Remove(ctx, txn, nids, running)
			return err
		})
		return n, err
	}
	deadlines, values := deleteDeadlinesSQL, array(nids)
	if running {
		deadlines += spareClaimedSQL
	}
	res, err := txn.ExecContext(ctx, deadlines, values)
	if err != nil {
		return 0, err
	}
	for _, table := range []string{"expiration_timers", "expiration_digests", "expiration_claims"} {
		if _, err = txn.ExecContext(ctx, fmt.Sprintf(deleteRestSQL, table), values); err != nil {
			return 0, err
		}
	}
	return res.RowsAffected()
}

// array returns a parameter for json_each.
func array(values any) any {
	data, _ := json.Marshal(values) // never fails for numbers and strings
	return string(data)
}

// One statement is one commit. Its parameter is an array of arrays.
const refreshTimersSQL = "UPDATE expiration_deadlines SET duration_ms = r.value ->> 1, deadline_ms = r.value ->> 2" +
	" FROM json_each($1) AS r WHERE timer_nid = r.value ->> 0 AND outcome IS NULL"

// To give back each row would take as long as to change it. It is asked for when there are fewer than expected.
const selectRunningSQL = "SELECT timer_nid FROM expiration_deadlines JOIN json_each($1) AS r ON timer_nid = r.value ->> 0" +
	" WHERE outcome IS NULL"

func (c *connection) Refresh(ctx context.Context, refreshes []expiration.Refresh, found func(nid int64)) error {
	values := make([][3]int64, len(refreshes))
	for i, r := range refreshes {
		values[i] = [3]int64{r.NID, r.Duration.Milliseconds(), r.Deadline.UnixMilli()}
	}
	data := array(values)
	if err := ctx.Err(); err != nil {
		return err
	}
	// If a context can end, the driver runs each statement in a goroutine of its own, and waits for that. What takes long here is the
	// disk, which cannot be interrupted anyway.
	ctx = context.WithoutCancel(ctx)
	return c.use(ctx, func(conn *sql.Conn) error {
		res, err := c.refresh.ExecContext(ctx, data)
		if err != nil {
			return err
		}
		if n, err := res.RowsAffected(); err == nil && n == int64(len(refreshes)) {
			for _, r := range refreshes {
				found(r.NID)
			}
			return nil
		}
		rows, err := conn.QueryContext(ctx, selectRunningSQL, data)
		if err != nil {
			return err
		}
		return shared.ScanNIDs(ctx, rows, found)
	})
}

const (
	claimTimerSQL = "UPDATE expiration_deadlines SET outcome = $1" +
		" WHERE timer_nid = $2 AND deadline_ms = $3 AND outcome IS NULL"
	insertClaimSQL = "INSERT INTO expiration_claims (timer_nid, event_id, room_version, pdu) VALUES ($1, $2, $3, $4)"
)

// One event after the other: to make JSON of them, and take it apart again, would take longer.
func (c *connection) Claim(ctx context.Context, claims []expiration.ConditionalClaim, found func(nid int64)) error {
	return c.Transaction(ctx, func(txn *sql.Tx) error {
		claimTimer, err := txn.PrepareContext(ctx, claimTimerSQL)
		if err != nil {
			return err
		}
		insertClaim, err := txn.PrepareContext(ctx, insertClaimSQL)
		if err != nil {
			return err
		}
		for _, claim := range claims {
			res, err := claimTimer.ExecContext(ctx, string(claim.Outcome), claim.NID, claim.Deadline.UnixMilli())
			if err != nil {
				return err
			}
			if n, err := res.RowsAffected(); err != nil || n == 0 {
				continue
			}
			if _, err = insertClaim.ExecContext(ctx,
				claim.NID, claim.Event.EventID, claim.Event.RoomVersion, claim.Event.PDU); err != nil {
				return err
			}
			found(claim.NID)
		}
		return nil
	})
}

// open opens a connection whose commits survive a power failure. The write-ahead log saves one of two syncs for each; for it
// the driver's own default would be not to sync at all. The statement that is run a thousand times per second is planned once.
func (c *connection) open(ctx context.Context) (err error) {
	if c.conn, err = c.db.Conn(ctx); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	err = set(ctx, c.conn, writeAhead, "synchronous = FULL", fmt.Sprintf("wal_autocheckpoint = %d", checkpointPages))
	if err != nil {
		return err
	}
	c.refresh, err = c.conn.PrepareContext(ctx, refreshTimersSQL)
	return err
}

// Ping implements shared.Writer. It takes the lock for writing, in its turn, and gives it back. A writer that hangs cannot be
// interrupted: no more than one Ping waits for it, and the others for that one, until they lose patience.
func (c *connection) Ping(ctx context.Context) error {
	select {
	case c.pinging <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	done := make(chan error, 1)
	go func() {
		defer func() { <-c.pinging }()
		// If the context could end between the two, the transaction would stay open.
		ctx := context.WithoutCancel(ctx)
		done <- c.use(ctx, func(conn *sql.Conn) error {
			if _, err := conn.ExecContext(ctx, "BEGIN IMMEDIATE"); err != nil {
				return err
			}
			_, err := conn.ExecContext(ctx, "ROLLBACK")
			return err
		})
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// closePatience is how long Close waits for what is being written and read.
const closePatience = 10 * time.Second

// Close implements shared.Writer. It moves everything from the log into the database file, so that a copy of that file alone has all
// timers. SQLite does so by itself when the last connection is closed; but the pool cannot close this one, which is in use, and the
// process could end before the others are closed.
func (c *connection) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closePatience)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		done <- c.writer.Do(nil, nil, func(*sql.Tx) error {
			c.closed = true
			if c.conn == nil {
				return nil // nothing was written, and whatever an earlier process left goes with the pool's last connection
			}
			defer c.close()
			var busy, logged, moved int // pages, but for the first
			err := c.conn.QueryRowContext(ctx, "PRAGMA wal_checkpoint(TRUNCATE)").Scan(&busy, &logged, &moved)
			if err == nil && busy != 0 {
				err = fmt.Errorf("somebody is still reading: %d of %d pages are in the database file", moved, logged)
			}
			return err
		})
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (c *connection) close() {
	if c.refresh != nil {
		_ = c.refresh.Close()
	}
	_ = c.conn.Close()
	c.conn, c.refresh = nil, nil
}
