package main

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/base64"
	"fmt"
	"time"

	"github.com/matrix-org/dendrite/internal/sqlutil"
	"github.com/matrix-org/dendrite/setup/config"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// table is the table of the timers, with the columns that are filled.
const table = "expiration_timers (event_id, room_id, event_type, state_key, sender, token_hash, duration_ms, received_ms," +
	" deadline_ms, request_hash, room_version, pdu)"

// fill puts running timers into the database of a server that does not run, instead of those that are there, and returns
// their tokens. Their events are in no room: only keep-alives concern them. To send so many events would take hours. Without
// deadlines they do not run out.
func fill(ctx context.Context, dsn string, n, rooms int, deadline func(i int) time.Time) (tokens []string, err error) {
	_, closeStore, err := openStore(ctx, dsn) // which makes the table
	if err != nil {
		return nil, err
	}
	closeStore()
	options := &config.DatabaseOptions{ConnectionString: config.DataSource(dsn)}
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
	if _, err = txn.ExecContext(ctx, "DELETE FROM expiration_timers"); err != nil {
		return nil, err
	}
	query := "INSERT INTO " + table + " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)"
	copying := config.DataSource(dsn).IsPostgres()
	if copying {
		query = "COPY " + table + " FROM STDIN"
	}
	insert, err := txn.PrepareContext(ctx, query)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	if deadline == nil {
		deadline = func(int) time.Time { return now.Add(endless) }
	}
	for i := range n {
		// As long as real ones are.
		token := fmt.Sprintf("%043d", i)
		hash := expiration.HashToken(token)
		user := fmt.Sprintf("@user%d:example.org", i)
		if _, err = insert.ExecContext(ctx,
			fmt.Sprintf("$%043d", i), fmt.Sprintf("!%018d:example.org", i%rooms), "m.call.member",
			fmt.Sprintf("_%s_%010d", user, i), user, hash[:], endless.Milliseconds(), now.UnixMilli(), deadline(i).UnixMilli(),
			hash[:], roomVersion, signedEvent(token),
		); err != nil {
			return nil, err
		}
		tokens = append(tokens, token)
	}
	if copying {
		if _, err = insert.ExecContext(ctx); err != nil {
			return nil, err
		}
	}
	if err = insert.Close(); err != nil {
		return nil, err
	}
	if err = txn.Commit(); err != nil {
		return nil, err
	}
	return tokens, analyse(ctx, db)
}

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
