package main

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/base64"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/matrix-org/dendrite/internal/sqlutil"
	"github.com/matrix-org/dendrite/setup/config"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// fill puts running timers into the database of a server that does not run, instead of those that are there, and returns
// their tokens. Their events are in no room: only keep-alives concern them. To send so many events would take hours. Without
// deadlines they do not run out.
func fill(
	ctx context.Context, d database, n, rooms int, deadline func(i int) time.Time,
) (tokens []string, err error) {
	_, closeStore, err := openStore(ctx, d.timers) // which makes the table
	if err != nil {
		return nil, err
	}
	closeStore()
	options := &config.DatabaseOptions{ConnectionString: config.DataSource(d.timers)}
	options.Defaults(1)
	db, err := sqlutil.Open(options, sqlutil.NewDummyWriter())
	if err != nil {
		return nil, err
	}
	defer db.Close()
	txn, err := db.BeginTx(ctx, nil)
	if err != nil {
		return nil, err
	}
	defer func() { _ = txn.Rollback() }()
	now := time.Now()
	if deadline == nil {
		deadline = func(int) time.Time { return now.Add(endless) }
	}
	for i := range n {
		tokens = append(tokens, tokenOf(int64(i+1)))
	}
	digests := make([]expiration.Digest, n)
	copying := config.DataSource(d.timers).IsPostgres()
	if err = fillTable(ctx, txn, copying, "expiration_timers", []string{
		"timer_nid", "event_id", "room_id", "event_type", "state_key", "sender", "token_hash", "received_ms", "request_hash",
		"room_version", "pdu",
	}, n, func(i int) []any {
		sender := fmt.Sprintf("@user%d:example.org", i)
		stateKey := fmt.Sprintf("_%s_%010d", sender, i)
		hash := expiration.HashToken(tokens[i])
		e := expiration.Event{
			ID: "$" + tokens[i], RoomID: fmt.Sprintf("!%018d:example.org", i%rooms), Type: "m.call.member", StateKey: &stateKey, Sender: sender,
			Request: &expiration.Request{Hash: expiration.RequestHash(hash)},
		}
		digests[i] = d.keys.Digest(expiration.Timer{Event: e, TokenHash: hash, Received: now})
		return []any{
			i + 1, e.ID, e.RoomID, e.Type, stateKey, sender, hash[:], now.UnixMilli(), hash[:], roomVersion, signedEvent(tokens[i]),
		}
	}); err != nil {
		return nil, err
	}
	if err = fillTable(ctx, txn, copying, "expiration_digests", []string{"timer_nid", "digest"}, n, func(i int) []any {
		return []any{i + 1, digests[i][:]}
	}); err != nil {
		return nil, err
	}
	if err = fillTable(ctx, txn, copying, "expiration_deadlines", []string{"timer_nid", "duration_ms", "deadline_ms"}, n, func(i int) []any {
		return []any{i + 1, endless.Milliseconds(), deadline(i).UnixMilli()}
	}); err != nil {
		return nil, err
	}
	if err = txn.Commit(); err != nil {
		return nil, err
	}
	return tokens, analyse(ctx, db)
}

// fillTable replaces all rows of a table.
func fillTable(ctx context.Context, txn *sql.Tx, copying bool, table string, columns []string, n int, row func(i int) []any) error {
	if _, err := txn.ExecContext(ctx, "DELETE FROM "+table); err != nil {
		return err
	}
	table += " (" + strings.Join(columns, ", ") + ")"
	query := "COPY " + table + " FROM STDIN"
	if !copying {
		query = "INSERT INTO " + table + " VALUES (?" + strings.Repeat(", ?", len(columns)-1) + ")"
	}
	insert, err := txn.PrepareContext(ctx, query)
	if err != nil {
		return err
	}
	for i := range n {
		if _, err = insert.ExecContext(ctx, row(i)...); err != nil {
			return err
		}
	}
	if copying {
		if _, err = insert.ExecContext(ctx); err != nil {
			return err
		}
	}
	return insert.Close()
}

// tokenOf returns the token of a timer by its number, as long as real ones are.
func tokenOf(nid int64) string { return fmt.Sprintf("%043d", nid) }

// timerOf returns the number of the timer of such a token.
func timerOf(token string) (nid int64, err error) { return strconv.ParseInt(token, 10, 64) }

// roomVersion is that of the rooms.
const roomVersion = "10"

// signedEvent returns something that is as long as the event of a call participant is, and can be compressed as little.
func signedEvent(seed string) []byte {
	id := sha256.Sum256([]byte(seed))
	var event []byte
	for _, key := range []string{"auth_events", "prev_events", "hashes", "signatures"} {
		event = fmt.Appendf(event, `{%q:["$%s","$%s"]}`, key, base64.RawURLEncoding.EncodeToString(id[:]), seed)
		id = sha256.Sum256(id[:])
	}
	return fmt.Appendf(event, `{"content":{"application":"m.call","call_id":"","scope":"m.room","device_id":"%x",`+
		`"focus_active":{"type":"livekit","focus_selection":"oldest_membership"},"foci_preferred":[{"type":"livekit",`+
		`"livekit_service_url":"https://livekit.example.org/jwt","livekit_alias":"!%s:example.org"}],"m.will_expire":"running"},`+
		`"depth":100,"origin_server_ts":1700000000000,"type":"m.call.member","unsigned":{}}`, id[:8], seed)
}

// analyse lets the database know what it has, as it would by itself in time.
func analyse(ctx context.Context, db *sql.DB) error {
	_, err := db.ExecContext(ctx, "ANALYZE")
	return err
}
