package shared

import (
	"database/sql"
	"fmt"
	"slices"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// A row is read whole when its timer ends, and at the start without what the index does not need: there can be a million of
// them, and each column takes its time.
const (
	indexedColumns = "t.timer_nid, t.event_id, t.room_id, t.event_type, t.state_key, t.sender, t.token_hash, d.duration_ms," +
		" t.received_ms, d.deadline_ms, t.request_hash, d.outcome, t.content IS NOT NULL, CASE WHEN d.outcome IS NOT NULL THEN" +
		" (SELECT claims.event_id FROM expiration_claims AS claims WHERE claims.timer_nid = t.timer_nid) END"
	otherColumns = "c.room_version, c.pdu, t.room_version, t.pdu, t.content, t.expires_ms, t.origin_server_ts, t.over_event_id"
)

// row is what is read into, one row after the other.
type row struct {
	nid                                int64
	eventID, roomID, eventType, sender string
	stateKey, outcome, sentID          sql.NullString
	hash, request                      sql.RawBytes
	duration, received, deadline       int64 // milliseconds
	isDelayed                          bool

	sentVersion, roomVersion sql.NullString
	sentPDU, pdu, content    []byte
	expires, timestamp       int64 // milliseconds
	over                     string

	indexed []any // where indexedColumns go
}

// readIndexed returns the timer of a row that has indexedColumns.
func (r *row) readIndexed(rows *sql.Rows) (expiration.Timer, error) {
	if err := rows.Scan(r.places()...); err != nil {
		return expiration.Timer{}, err
	}
	return r.timer()
}

// read returns the timer of a row that has otherColumns too.
func (r *row) read(rows *sql.Rows) (expiration.Timer, error) {
	if err := rows.Scan(append(r.places(),
		&r.sentVersion, &r.sentPDU, &r.roomVersion, &r.pdu, &r.content, &r.expires, &r.timestamp, &r.over,
	)...); err != nil {
		return expiration.Timer{}, err
	}
	t, err := r.timer()
	if t.Claim != nil {
		t.Claim.Event.RoomVersion, t.Claim.Event.PDU = r.sentVersion.String, r.sentPDU
	}
	if t.Event.Request != nil {
		t.Event.Request.Signed.RoomVersion, t.Event.Request.Signed.PDU = r.roomVersion.String, r.pdu
	}
	if t.Delayed != nil {
		t.Delayed.Content, t.Delayed.Expires, t.Delayed.Over = r.content, time.Duration(r.expires)*time.Millisecond, r.over
		if r.timestamp != 0 {
			t.Delayed.Timestamp = time.UnixMilli(r.timestamp).UTC()
		}
	}
	return t, err
}

func (r *row) places() []any {
	if r.indexed == nil {
		r.indexed = []any{
			&r.nid, &r.eventID, &r.roomID, &r.eventType, &r.stateKey, &r.sender, &r.hash, &r.duration, &r.received, &r.deadline,
			&r.request, &r.outcome, &r.isDelayed, &r.sentID,
		}
	}
	return slices.Clip(r.indexed)
}

// timer returns what indexedColumns say.
func (r *row) timer() (expiration.Timer, error) {
	t := expiration.Timer{
		NID:      r.nid,
		Event:    expiration.Event{ID: r.eventID, RoomID: r.roomID, Type: r.eventType, Sender: r.sender},
		Duration: time.Duration(r.duration) * time.Millisecond,
		Received: time.UnixMilli(r.received).UTC(), Deadline: time.UnixMilli(r.deadline).UTC(),
	}
	if len(r.hash) != len(t.TokenHash) || (r.request != nil && len(r.request) != len(expiration.RequestHash{})) {
		return t, fmt.Errorf("the timer of %s has hashes of %d and %d bytes", r.eventID, len(r.hash), len(r.request))
	}
	copy(t.TokenHash[:], r.hash)
	if r.stateKey.Valid {
		stateKey := r.stateKey.String
		t.Event.StateKey = &stateKey
	}
	if r.request != nil {
		t.Event.Request = &expiration.Request{
			Hash: expiration.RequestHash(r.request), Signed: expiration.SignedEvent{EventID: r.eventID},
		}
	}
	if r.outcome.Valid {
		t.Claim = &expiration.Claim{
			Outcome: expiration.Outcome(r.outcome.String), Event: expiration.SignedEvent{EventID: r.sentID.String},
		}
	}
	if r.isDelayed {
		t.Delayed = &expiration.Delayed{}
	}
	return t, nil
}
