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

// fill replaces the timers in the database of a stopped server, and returns the tokens of the new ones. The events of the timers are in no
// room, so only keep-alives work on them. Sending so many events would take hours. If deadline is nil, the timers do not expire.
func fill(
	ctx context.Context, d database, n, rooms int, deadline func(i int) time.Time,
) (tokens []string, err error) {
	_, closeStore, err := openStore(ctx, d.timers) // creates the tables
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
		"timer_nid", "event_id", "room_id", "event_type", "state_key", "sender", "token_hash", "received_ms",
		"room_version", "pdu",
	}, n, func(i int) []any {
		sender := fmt.Sprintf("@user%d:example.org", i)
		stateKey := fmt.Sprintf("_%s_%010d", sender, i)
		hash := expiration.HashToken(tokens[i])
		e := expiration.Event{
			ID: "$" + tokens[i], RoomID: fmt.Sprintf("!%018d:example.org", i%rooms), Type: "m.call.member", StateKey: &stateKey, Sender: sender,
		}
		digests[i] = d.keys.Digest(expiration.Timer{Event: e, TokenHash: hash, Received: now})
		return []any{
			i + 1, e.ID, e.RoomID, e.Type, stateKey, sender, hash[:], now.UnixMilli(), roomVersion, signedEvent(tokens[i]),
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

// tokenOf returns the token of a timer by its number. It is as long as a real token.
func tokenOf(nid int64) string { return fmt.Sprintf("%043d", nid) }

// timerOf returns the number of the timer with this token.
func timerOf(token string) (nid int64, err error) { return strconv.ParseInt(token, 10, 64) }

// roomVersion is the version of all rooms.
const roomVersion = "10"

// signedEvent returns bytes that are as long as the event of a call participant, and compress as badly.
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

// analyse updates the database's statistics, as the database does by itself after some time.
func analyse(ctx context.Context, db *sql.DB) error {
	_, err := db.ExecContext(ctx, "ANALYZE")
	return err
}
