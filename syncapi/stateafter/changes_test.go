package stateafter

import (
	"context"
	"database/sql"
	"fmt"
	"maps"
	"slices"
	"testing"

	rstypes "github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/dendrite/syncapi/storage/tables"
	"github.com/matrix-org/dendrite/syncapi/synctypes"
	"github.com/matrix-org/dendrite/syncapi/types"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/stretchr/testify/require"
)

// counter counts the queries to the syncapi's database.
type counter struct {
	querier
	queries int
}

func (c *counter) QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error) {
	c.queries++
	return c.querier.QueryContext(ctx, query, args...)
}

type countedEvents struct {
	tables.Events
	*counter
}

func (e countedEvents) SelectEvents(
	ctx context.Context, txn *sql.Tx, ids []string, filter *synctypes.RoomEventFilter, ordered bool,
) ([]types.StreamEvent, error) {
	e.queries++
	return e.Events.SelectEvents(ctx, txn, ids, filter, ordered)
}

func (e countedEvents) SelectStateInRange(
	ctx context.Context, txn *sql.Tx, r types.Range, filter *synctypes.StateFilter, rooms []string,
) (map[string]map[string]bool, map[string]types.StreamEvent, error) {
	e.queries++
	return e.Events.SelectStateInRange(ctx, txn, r, filter, rooms)
}

type countedState struct {
	tables.CurrentRoomState
	*counter
}

func (s countedState) SelectStateEvent(ctx context.Context, txn *sql.Tx, roomID, eventType, key string) (*rstypes.HeaderedEvent, error) {
	s.queries++
	return s.CurrentRoomState.SelectStateEvent(ctx, txn, roomID, eventType, key)
}

func (s countedState) SelectEventsWithEventIDs(ctx context.Context, txn *sql.Tx, ids []string) ([]types.StreamEvent, error) {
	s.queries++
	return s.CurrentRoomState.SelectEventsWithEventIDs(ctx, txn, ids)
}

func (h *history) count() *counter {
	r := h.after.record
	c := &counter{querier: r.sql}
	r.sql = c
	r.db.OutputEvents = countedEvents{r.db.OutputEvents, c}
	r.db.CurrentRoomState = countedState{r.db.CurrentRoomState, c}
	return c
}

// sendMany does what send does for many events, in one transaction.
func (h *history) sendMany(n int, content func(i int) (eventType, stateKey, sender, content string)) types.StreamPosition {
	db := h.after.record.db
	txn, err := db.DB.BeginTx(h.t.Context(), nil)
	require.NoError(h.t, err)
	var position types.StreamPosition
	for i := range n {
		event := h.event(content(i))
		var gone []string
		if old := h.state[keyOf(event)]; old != "" {
			gone = []string{old}
		}
		h.state[keyOf(event)] = event.EventID()
		position, err = db.OutputEvents.InsertEvent(
			h.t.Context(), txn, event, []string{event.EventID()}, gone, nil, false, gomatrixserverlib.HistoryVisibilityShared)
		require.NoError(h.t, err)
		var membership *string
		if event.Type() == spec.MRoomMember {
			value, err := event.Membership()
			require.NoError(h.t, err)
			membership = &value
		}
		require.NoError(h.t, db.CurrentRoomState.UpsertRoomState(h.t.Context(), txn, event, membership, position))
	}
	require.NoError(h.t, txn.Commit())
	h.states[position] = maps.Clone(h.state)
	h.positions = append(h.positions, position)
	return position
}

// The number of queries is bounded, however many changes there were since the token. This holds after the user has entered or left the
// room, for a sync up to an earlier position, and for a client that needs many members.
func TestManyChanges(t *testing.T) {
	const (
		many = 3000
		// few is the limit for the number of queries, each of which reads up to some hundred events.
		few = 40
	)
	onEachDatabase(t, func(t *testing.T, h *history) {
		_, before := h.send("m.room.member", bob, bob, `{"membership":"join"}`)
		was := maps.Clone(h.state)
		c, early, leaver := h.client(bob, ""), h.client(alice, ""), h.client(bob, "")
		c.sync(before, "join", `{}`)
		leaver.sync(before, "join", `{}`)
		h.send("m.room.member", bob, bob, `{"membership":"leave"}`)
		_, gone := h.send("m.room.topic", "", alice, `{"topic":"not for bob"}`)
		h.send("m.room.member", bob, bob, `{"membership":"join"}`)
		position := h.sendMany(many, func(i int) (eventType, stateKey, sender, content string) {
			if user := fmt.Sprintf("@user%d:localhost", i%300); i%2 == 0 {
				return "m.room.member", user, user, fmt.Sprintf(`{"membership":"join","displayname":"%d"}`, i)
			}
			return "m.room.topic", "", alice, fmt.Sprintf(`{"topic":"%d"}`, i)
		})

		counted := h.count()
		require.ElementsMatch(t, slices.Collect(maps.Values(h.state)), c.sync(position, "join", `{}`))
		require.Less(t, counted.queries, few, "who came in again")

		counted.queries = 0
		leaver.sync(gone, "leave", `{}`)
		require.Less(t, counted.queries, few, "who left")
		require.NotContains(t, leaver.told().Raw, "not for bob")

		counted.queries = 0
		early.sync(before, "join", `{}`)
		require.Less(t, counted.queries, few, "who asks for an earlier moment")
		require.Equal(t, was, early.known)

		lazy := h.client(alice, `{"room":{"state":{"lazy_load_members":true}}}`)
		room := `{"timeline":{"events":[`
		for i := range 150 {
			room += fmt.Sprintf(`{"type":"m.room.message","sender":"@user%d:localhost"},`, 2*i)
		}
		counted.queries = 0
		lazy.sync(position, "join", room[:len(room)-1]+`]}}`)
		require.Less(t, counted.queries, few, "many members")
		require.Equal(t, h.state["m.room.member|@user298:localhost"], lazy.known["m.room.member|@user298:localhost"])
	})
}
