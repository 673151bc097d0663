package shared

import (
	"database/sql"
	"fmt"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// columns are the columns of a timer, from expiration_timers as t and expiration_deadlines as d.
const columns = "t.timer_nid, t.event_id, t.room_id, t.event_type, t.state_key, t.sender, t.token_hash, d.duration_ms," +
	" t.received_ms, d.deadline_ms, t.request_hash, t.room_version, t.pdu, d.outcome," +
	" t.content, t.expires_ms, t.origin_server_ts, t.service"

// readTimer returns the timer of a row. If the timer is claimed, its claim has only the outcome, see addClaims.
func readTimer(rows *sql.Rows) (t expiration.Timer, err error) {
	var (
		stateKey, outcome, roomVersion                   sql.NullString
		hash, request                                    sql.RawBytes
		pdu, content                                     []byte
		duration, received, deadline, expires, timestamp int64 // milliseconds
		service                                          bool
	)
	if err = rows.Scan(
		&t.NID, &t.Event.ID, &t.Event.RoomID, &t.Event.Type, &stateKey, &t.Event.Sender, &hash, &duration,
		&received, &deadline, &request, &roomVersion, &pdu, &outcome,
		&content, &expires, &timestamp, &service,
	); err != nil {
		return t, err
	}
	if len(hash) != len(t.TokenHash) || (request != nil && len(request) != len(expiration.RequestHash{})) {
		return t, fmt.Errorf("the timer of %s has hashes of %d and %d bytes", t.Event.ID, len(hash), len(request))
	}
	copy(t.TokenHash[:], hash)
	t.Duration = time.Duration(duration) * time.Millisecond
	t.Received, t.Deadline = time.UnixMilli(received).UTC(), time.UnixMilli(deadline).UTC()
	if stateKey.Valid {
		t.Event.StateKey = &stateKey.String
	}
	if request != nil {
		t.Event.Request = &expiration.Request{
			Hash:   expiration.RequestHash(request),
			Signed: expiration.SignedEvent{EventID: t.Event.ID, RoomVersion: roomVersion.String, PDU: pdu},
		}
	}
	if outcome.Valid {
		t.Claim = &expiration.Claim{Outcome: expiration.Outcome(outcome.String)}
	}
	if content != nil {
		t.Delayed = &expiration.Delayed{
			Content: content, Expires: time.Duration(expires) * time.Millisecond, Timestamp: readTimestamp(timestamp),
			Service: service,
		}
	}
	return t, nil
}

// epoch stands for the first millisecond of 1970 in the column origin_server_ts, where 0 means that no time was given. No event can have
// an earlier time.
const epoch = -1

func storedTimestamp(t time.Time) int64 {
	switch {
	case t.IsZero():
		return 0
	case t.UnixMilli() == 0:
		return epoch
	}
	return t.UnixMilli()
}

func readTimestamp(stored int64) time.Time {
	switch stored {
	case 0:
		return time.Time{}
	case epoch:
		stored = 0
	}
	return time.UnixMilli(stored).UTC()
}
