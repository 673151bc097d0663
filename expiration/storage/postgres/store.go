// Package postgres keeps timers in a PostgreSQL database. Dendrite's components may use the same database.
package postgres

import (
	"context"
	"database/sql"
	"errors"

	"github.com/lib/pq"
	"github.com/matrix-org/dendrite/internal/sqlutil"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/storage/shared"
)

// Open makes the missing tables, and returns the store.
func Open(ctx context.Context, db *sql.DB) (*shared.Store, error) {
	if err := shared.CreateSchema(ctx, db, tablesSQL, schemaSQL); err != nil {
		return nil, err
	}
	d := &database{db: db}
	if err := (sqlutil.StatementList{
		{Statement: &d.insertTimer, SQL: insertTimerSQL},
		{Statement: &d.removeTimers, SQL: removeTimersSQL},
		{Statement: &d.removeRunning, SQL: removeRunningSQL},
		{Statement: &d.refreshTimers, SQL: refreshTimersSQL},
		{Statement: &d.selectRunning, SQL: selectRunningSQL},
		{Statement: &d.claimTimers, SQL: claimTimersSQL},
	}).Prepare(db); err != nil {
		return nil, err
	}
	return shared.New(db, d)
}

// Each write is one statement, because one statement is one round trip to the database.
const (
	insertTimerSQL = "WITH digest AS (INSERT INTO expiration_digests (timer_nid, digest) VALUES ($1, $16))," +
		" deadline AS (INSERT INTO expiration_deadlines (timer_nid, duration_ms, deadline_ms) VALUES ($1, $17, $18)) " +
		shared.InsertTimerSQL

	// The rows of expiration_deadlines are locked first, so that a removal waits for a claim of the same timer.
	removeTimersSQL  = "WITH gone AS (SELECT timer_nid FROM expiration_deadlines WHERE timer_nid = ANY($1)" + removeSQL
	removeRunningSQL = "WITH gone AS (SELECT timer_nid FROM expiration_deadlines WHERE timer_nid = ANY($1) AND outcome IS NULL" +
		removeSQL
	removeSQL = " FOR UPDATE)," +
		" timers AS (DELETE FROM expiration_timers AS t USING gone WHERE t.timer_nid = gone.timer_nid)," +
		" digests AS (DELETE FROM expiration_digests AS g USING gone WHERE g.timer_nid = gone.timer_nid)," +
		" claims AS (DELETE FROM expiration_claims AS c USING gone WHERE c.timer_nid = gone.timer_nid)," +
		" delegations AS (DELETE FROM expiration_delegations AS k USING gone WHERE k.timer_nid = gone.timer_nid)" +
		" DELETE FROM expiration_deadlines AS d USING gone WHERE d.timer_nid = gone.timer_nid"

	// A refresh changes no indexed column, so that PostgreSQL need not update an index.
	//
	// The last two conditions are always true, and are there for the planner. Without them it expects ten timers, and plans to read the
	// whole table if that has a few thousand rows. It keeps this plan even when the table has grown. With them it expects one timer and
	// uses the index.
	refreshTimersSQL = "UPDATE expiration_deadlines AS d SET duration_ms = r.duration_ms, deadline_ms = r.deadline_ms, slack = NULL" +
		" FROM unnest($1::BIGINT[], $2::BIGINT[], $3::BIGINT[]) AS r (timer_nid, duration_ms, deadline_ms)" +
		" WHERE d.timer_nid = r.timer_nid AND d.outcome IS NULL AND r.duration_ms > 0 AND r.deadline_ms > 0"
	// The refreshed timers are looked up only if fewer timers were refreshed than expected.
	selectRunningSQL = "SELECT timer_nid FROM expiration_deadlines WHERE timer_nid = ANY($1) AND outcome IS NULL"

	// All events are one value, with the start (from 1) and the length of each event. An array of events would be encoded as text within
	// text, which takes a fifth of the time of a claim.
	claimTimersSQL = "WITH claimed AS (UPDATE expiration_deadlines AS d SET outcome = c.outcome" +
		" FROM unnest($1::BIGINT[], $2::BIGINT[], $3::TEXT[]) AS c (timer_nid, deadline_ms, outcome)" +
		" WHERE d.timer_nid = c.timer_nid AND d.deadline_ms = c.deadline_ms AND d.outcome IS NULL RETURNING d.timer_nid)" +
		" INSERT INTO expiration_claims (timer_nid, event_id, room_version, pdu)" +
		" SELECT timer_nid, event_id, room_version, substring($6::BYTEA FROM c.start FOR c.length)" +
		" FROM unnest($1::BIGINT[], $4::TEXT[], $5::TEXT[], $7::INT[], $8::INT[]) AS c (timer_nid, event_id, room_version, start, length)" +
		" JOIN claimed USING (timer_nid) RETURNING timer_nid"
)

// database implements shared.Database.
type database struct {
	db *sql.DB

	insertTimer, removeTimers, removeRunning, refreshTimers, selectRunning, claimTimers *sql.Stmt
}

func (d *database) Among(column, parameter string) string {
	return column + " = ANY(" + parameter + ")"
}

func (d *database) Values(slice any) any { return pq.Array(slice) }

func (d *database) Insert(ctx context.Context, values []any, digest expiration.Digest, duration, deadline int64) error {
	_, err := d.insertTimer.ExecContext(ctx, append(values, digest[:], duration, deadline)...)
	return err
}

func (d *database) Remove(ctx context.Context, txn *sql.Tx, nids []int64, running bool) (int64, error) {
	statement := d.removeTimers
	if running {
		statement = d.removeRunning
	}
	res, err := sqlutil.TxStmtContext(ctx, txn, statement).ExecContext(ctx, pq.Array(nids))
	if err != nil {
		return 0, err
	}
	return res.RowsAffected()
}

func (d *database) Transaction(ctx context.Context, f func(*sql.Tx) error) error {
	txn, err := d.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	return shared.Commit(txn, f)
}

// errReadOnly is the error for a PostgreSQL server that is in recovery or configured to be read-only.
var errReadOnly = errors.New("the database is read-only")

func (d *database) Ping(ctx context.Context) error {
	var readOnly string
	if err := d.db.QueryRowContext(ctx, "SHOW transaction_read_only").Scan(&readOnly); err != nil {
		return err
	}
	if readOnly != "off" {
		return errReadOnly
	}
	return nil
}

// Close implements shared.Database. There is nothing to do, because PostgreSQL keeps everything that is committed.
func (d *database) Close() error { return nil }

func (d *database) Refresh(ctx context.Context, refreshes []expiration.Refresh, found func(nid int64)) error {
	nids, durations, deadlines := make([]int64, len(refreshes)), make([]int64, len(refreshes)), make([]int64, len(refreshes))
	for i, r := range refreshes {
		nids[i], durations[i], deadlines[i] = r.NID, r.Duration.Milliseconds(), r.Deadline.UnixMilli()
	}
	res, err := d.refreshTimers.ExecContext(ctx, pq.Array(nids), pq.Array(durations), pq.Array(deadlines))
	if err != nil {
		return err
	}
	if n, err := res.RowsAffected(); err == nil && n == int64(len(refreshes)) {
		for _, nid := range nids {
			found(nid)
		}
		return nil
	}
	rows, err := d.selectRunning.QueryContext(ctx, pq.Array(nids))
	if err != nil {
		return err
	}
	return shared.ScanNIDs(ctx, rows, found)
}

func (d *database) Claim(ctx context.Context, claims []expiration.ConditionalClaim, found func(nid int64)) error {
	var (
		nids, deadlines                  = make([]int64, len(claims)), make([]int64, len(claims))
		outcomes, eventIDs, roomVersions = make([]string, len(claims)), make([]string, len(claims)), make([]string, len(claims))
		pdus                             []byte
		starts, lengths                  = make([]int32, len(claims)), make([]int32, len(claims))
	)
	for i, c := range claims {
		nids[i], deadlines[i], outcomes[i] = c.NID, c.Deadline.UnixMilli(), string(c.Outcome)
		eventIDs[i], roomVersions[i] = c.Event.EventID, c.Event.RoomVersion
		starts[i], lengths[i] = int32(len(pdus)+1), int32(len(c.Event.PDU))
		pdus = append(pdus, c.Event.PDU...)
	}
	rows, err := d.claimTimers.QueryContext(ctx, pq.Array(nids), pq.Array(deadlines), pq.Array(outcomes),
		pq.Array(eventIDs), pq.Array(roomVersions), pdus, pq.Array(starts), pq.Array(lengths))
	if err != nil {
		return err
	}
	return shared.ScanNIDs(ctx, rows, found)
}
