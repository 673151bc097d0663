package shared

import (
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// The statements on finalised delayed events.
const (
	insertFinalisedSQL = "INSERT INTO expiration_finalised (row_id, room_id, event_type, state_key, sender, token_hash," +
		" duration_ms, received_ms, deadline_ms, request_hash, content, finalised_ms, event_id, error, existed)" +
		" SELECT t.event_id, t.room_id, t.event_type, t.state_key, t.sender, t.token_hash, d.duration_ms, t.received_ms," +
		" d.deadline_ms, t.request_hash, t.content, $1, $2, $3, $4" + fromTimersSQL + " WHERE t.timer_nid = $5 AND t.content IS NOT NULL" +
		" RETURNING sender"
	// The offset is the number of rows that are kept. The row at the offset is the newest that is deleted, with all older rows.
	limitFinalisedSQL = "DELETE FROM expiration_finalised WHERE sender = $1 AND finalised_nid <=" +
		" (SELECT finalised_nid FROM expiration_finalised WHERE sender = $2 ORDER BY finalised_nid DESC LIMIT 1 OFFSET $3)"
	selectFinalisedSQL = "SELECT row_id, room_id, event_type, state_key, sender, duration_ms, received_ms, deadline_ms, content," +
		" finalised_ms, event_id, error, existed FROM expiration_finalised WHERE token_hash = $1"
	// Equal messages that are built at once are one event. It belongs to the row that was finalised first, which is read last.
	selectFinalisedAsSQL = "SELECT event_id, row_id FROM expiration_finalised WHERE sender = $1 AND NOT existed AND "
	firstFinalisedSQL    = " ORDER BY finalised_nid DESC"
	selectSendersSQL     = "SELECT DISTINCT sender FROM expiration_finalised WHERE event_id IS NOT NULL"
	selectRequestSQL     = "SELECT event_id FROM expiration_timers WHERE request_hash = $1 AND content IS NOT NULL" +
		" UNION ALL SELECT row_id FROM expiration_finalised WHERE request_hash = $2 LIMIT 1"
	pruneSQL = "DELETE FROM expiration_finalised WHERE finalised_ms < $1"
	eraseSQL = "DELETE FROM expiration_finalised WHERE sender = $1"
)

// Commit calls f and commits the transaction. If f fails or panics, it rolls the transaction back.
func Commit(txn *sql.Tx, f func(*sql.Tx) error) error {
	defer func() { _ = txn.Rollback() }() // does nothing after a commit
	if err := f(txn); err != nil {
		return err
	}
	return txn.Commit()
}

func (s *Store) Finalise(ctx context.Context, nid int64, f expiration.Final, running bool, keep int) (bool, error) {
	var eventID, failure *string
	if f.EventID != "" {
		eventID = &f.EventID
	}
	if f.Error != nil {
		text := string(f.Error)
		failure = &text
	}
	err := s.database.Transaction(ctx, func(txn *sql.Tx) error {
		var sender string
		if err := txn.QueryRowContext(ctx, insertFinalisedSQL, f.At.UnixMilli(), eventID, failure, f.Existed, nid).Scan(&sender); err != nil {
			return err
		}
		// If the timer is claimed and only a running timer may be removed, the error rolls back the insertion.
		if n, err := s.database.Remove(ctx, txn, []int64{nid}, running); err != nil || n == 0 {
			return cmp.Or(err, sql.ErrNoRows)
		}
		_, err := txn.ExecContext(ctx, limitFinalisedSQL, sender, sender, keep)
		return err
	})
	if errors.Is(err, sql.ErrNoRows) {
		return false, nil
	}
	return err == nil, err
}

func (s *Store) Finalised(ctx context.Context, h expiration.TokenHash) (expiration.DelayedEvent, error) {
	var (
		stateKey, eventID, failure              sql.NullString
		duration, received, deadline, finalised int64
		existed                                 bool
		t                                       = expiration.Timer{TokenHash: h, Delayed: &expiration.Delayed{}}
	)
	err := s.db.QueryRowContext(ctx, selectFinalisedSQL, h[:]).Scan(
		&t.Event.ID, &t.Event.RoomID, &t.Event.Type, &stateKey, &t.Event.Sender, &duration, &received, &deadline,
		&t.Delayed.Content, &finalised, &eventID, &failure, &existed,
	)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return expiration.DelayedEvent{}, expiration.ErrNotFound
	case err != nil:
		return expiration.DelayedEvent{}, err
	}
	if stateKey.Valid {
		t.Event.StateKey = &stateKey.String
	}
	t.Duration = time.Duration(duration) * time.Millisecond
	t.Received, t.Deadline = time.UnixMilli(received).UTC(), time.UnixMilli(deadline).UTC()
	f := &expiration.Final{At: time.UnixMilli(finalised).UTC(), EventID: eventID.String, Existed: existed}
	if failure.Valid {
		f.Error = json.RawMessage(failure.String)
	}
	return expiration.DelayedEvent{Timer: t, Final: f}, nil
}

func (s *Store) FinalisedAs(ctx context.Context, sender string, eventIDs []string) (map[string]string, error) {
	query := selectFinalisedAsSQL + s.database.Among("event_id", "$2") + firstFinalisedSQL
	rows, err := s.db.QueryContext(ctx, query, sender, s.database.Values(eventIDs))
	if err != nil {
		return nil, err
	}
	rowIDs := map[string]string{}
	return rowIDs, each(ctx, rows, func() error {
		var eventID, rowID string
		err := rows.Scan(&eventID, &rowID)
		rowIDs[eventID] = rowID
		return err
	})
}

func (s *Store) FinalisedSenders(ctx context.Context) (senders []string, err error) {
	rows, err := s.db.QueryContext(ctx, selectSendersSQL)
	if err != nil {
		return nil, err
	}
	err = each(ctx, rows, func() error {
		var sender string
		err := rows.Scan(&sender)
		senders = append(senders, sender)
		return err
	})
	return senders, err
}

func (s *Store) Requested(ctx context.Context, h expiration.RequestHash) (rowID string, err error) {
	err = s.db.QueryRowContext(ctx, selectRequestSQL, h[:], h[:]).Scan(&rowID)
	if errors.Is(err, sql.ErrNoRows) {
		err = expiration.ErrNotFound
	}
	return rowID, err
}

func (s *Store) Prune(ctx context.Context, before time.Time) error {
	return s.write(ctx, pruneSQL, before.UnixMilli())
}

func (s *Store) Erase(ctx context.Context, sender string) error {
	return s.write(ctx, eraseSQL, sender)
}

// write makes one statement durable.
func (s *Store) write(ctx context.Context, statement string, args ...any) error {
	return s.database.Transaction(ctx, func(txn *sql.Tx) error {
		_, err := txn.ExecContext(ctx, statement, args...)
		return err
	})
}
