package stateafter

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/url"
	"path/filepath"
	"slices"
	"testing"

	"github.com/matrix-org/dendrite/internal/sqlutil"
	"github.com/matrix-org/dendrite/roomserver/api"
	rstypes "github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/dendrite/setup/config"
	"github.com/matrix-org/dendrite/syncapi/storage"
	"github.com/matrix-org/dendrite/syncapi/types"
	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/postgres"
)

func TestMain(m *testing.M) { postgres.Main(m) }

const (
	roomID = "!room:localhost"
	alice  = "@alice:localhost"
	bob    = "@bob:localhost"
)

// roomserver is a fake that has all events. Its sender IDs are user IDs.
type roomserver struct {
	events map[string]*rstypes.HeaderedEvent
}

func (r *roomserver) QueryUserIDForSender(_ context.Context, _ spec.RoomID, sender spec.SenderID) (*spec.UserID, error) {
	return spec.NewUserID(string(sender), true)
}

func (r *roomserver) QueryEventsByID(_ context.Context, req *api.QueryEventsByIDRequest, res *api.QueryEventsByIDResponse) error {
	for _, eventID := range req.EventIDs {
		if event := r.events[eventID]; event != nil {
			res.Events = append(res.Events, event)
		}
	}
	return nil
}

// history writes a room into Dendrite's syncapi, event by event, as the syncapi does with the roomserver's output. It remembers the state
// after each event.
type history struct {
	t          *testing.T
	db         storage.Database
	roomserver *roomserver
	after      *Route
	state      map[string]string // event IDs by type and state key
	states     map[types.StreamPosition]map[string]string
	positions  []types.StreamPosition
	rewritten  types.StreamPosition // the position of the last rewriting of the state
	deleted    bool                 // whether state was ever removed without a replacement
}

func newHistory(t *testing.T, dsn string) *history {
	options := &config.DatabaseOptions{ConnectionString: config.DataSource(dsn)}
	options.Defaults(10)
	cm := sqlutil.NewConnectionManager(nil, config.DatabaseOptions{})
	db, _, err := cm.Connection(options)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, db.Close()) })
	h := &history{
		t: t, state: map[string]string{}, states: map[types.StreamPosition]map[string]string{},
		roomserver: &roomserver{map[string]*rstypes.HeaderedEvent{}},
	}
	h.after, err = New(t.Context(), cm, options, h.roomserver)
	require.NoError(t, err)
	h.db, err = storage.NewSyncServerDatasource(t.Context(), cm, options)
	require.NoError(t, err)
	h.send("m.room.create", "", alice, `{"creator":"`+alice+`"}`)
	h.send("m.room.member", alice, alice, `{"membership":"join"}`)
	return h
}

// event makes an event. If the type is "", it is a message.
func (h *history) event(eventType, stateKey, sender, content string) *rstypes.HeaderedEvent {
	eventID := fmt.Sprintf("$event%d", len(h.roomserver.events))
	event := map[string]any{
		"type": "m.room.message", "sender": sender, "room_id": roomID, "content": json.RawMessage(content),
		"origin_server_ts": 1, "depth": len(h.roomserver.events) + 1, "prev_events": []string{}, "auth_events": []string{},
	}
	if eventType != "" {
		event["type"], event["state_key"] = eventType, stateKey
	}
	data, err := json.Marshal(event)
	require.NoError(h.t, err)
	pdu, err := gomatrixserverlib.MustGetRoomVersion(gomatrixserverlib.RoomVersionV10).NewEventFromTrustedJSONWithEventID(eventID, data, false)
	require.NoError(h.t, err)
	userID, err := spec.NewUserID(sender, true)
	require.NoError(h.t, err)
	// The same as in the syncapi's consumer.
	h.roomserver.events[eventID] = &rstypes.HeaderedEvent{PDU: pdu, UserID: *userID, StateKeyResolved: pdu.StateKey()}
	return h.roomserver.events[eventID]
}

func keyOf(e *rstypes.HeaderedEvent) string { return e.Type() + "|" + *e.StateKey() }

// write writes an event that adds the events in added to the state, and removes the state with the keys in gone.
func (h *history) write(event *rstypes.HeaderedEvent, added []*rstypes.HeaderedEvent, gone ...string) types.StreamPosition {
	var addedIDs, removedIDs []string
	for _, key := range gone {
		removedIDs = append(removedIDs, h.state[key])
		delete(h.state, key)
		h.deleted = true
	}
	for _, e := range added {
		if old := h.state[keyOf(e)]; old != "" {
			removedIDs = append(removedIDs, old)
		}
		addedIDs = append(addedIDs, e.EventID())
		h.state[keyOf(e)] = e.EventID()
	}
	return h.insert(event, added, addedIDs, removedIDs)
}

func (h *history) insert(
	event *rstypes.HeaderedEvent, added []*rstypes.HeaderedEvent, addedIDs, removedIDs []string,
) types.StreamPosition {
	position, err := h.db.WriteEvent(h.t.Context(), event, added, addedIDs, removedIDs, nil, false, gomatrixserverlib.HistoryVisibilityShared)
	require.NoError(h.t, err)
	h.states[position] = maps.Clone(h.state)
	h.positions = append(h.positions, position)
	return position
}

// send writes a state event that changes the state.
func (h *history) send(eventType, stateKey, sender, content string) (string, types.StreamPosition) {
	event := h.event(eventType, stateKey, sender, content)
	return event.EventID(), h.write(event, []*rstypes.HeaderedEvent{event})
}

// say writes a message that changes the state as write does.
func (h *history) say(added []*rstypes.HeaderedEvent, gone ...string) types.StreamPosition {
	return h.write(h.event("", "", alice, `{}`), added, gone...)
}

// rewrite replaces the whole state, as happens after a gap: the old state is not recorded as removed. The key in without is left out.
func (h *history) rewrite(without string) {
	event := h.event("m.room.member", alice, alice, `{"membership":"join"}`)
	h.deleted = h.deleted || h.state[without] != ""
	delete(h.state, without)
	h.state[keyOf(event)] = event.EventID()
	require.NoError(h.t, h.db.PurgeRoomState(h.t.Context(), roomID))
	var added []*rstypes.HeaderedEvent
	for _, eventID := range h.state {
		added = append(added, h.roomserver.events[eventID])
	}
	h.rewritten = h.insert(event, added, slices.Collect(maps.Values(h.state)), nil)
}

// client is a client that remembers the state it got.
type client struct {
	h     *history
	user  string
	query url.Values
	at    types.StreamPosition
	known map[string]string
	last  gjson.Result
}

func (h *history) client(user string, filter string) *client {
	return &client{h: h, user: user, query: url.Values{"filter": {filter}}, known: map[string]string{}}
}

// sync syncs up to a position. In Dendrite's answer the room is under where, which is "join" or "leave", or nowhere if where is "". sync
// returns the IDs of the state events in the final answer.
func (c *client) sync(to types.StreamPosition, where, room string) []string {
	body := map[string]any{"next_batch": types.StreamingToken{PDUPosition: to}, "other": 1}
	if where != "" {
		body["rooms"] = map[string]any{where: map[string]any{roomID: json.RawMessage(room)}}
	}
	data, err := json.Marshal(body)
	require.NoError(c.h.t, err)
	answer, err := c.h.after.replace(c.h.t.Context(), data, c.query, &userapi.Device{UserID: c.user}, field)
	require.NoError(c.h.t, err)
	data, err = json.Marshal(answer)
	require.NoError(c.h.t, err)
	c.last = gjson.ParseBytes(data)
	require.Equal(c.h.t, int64(1), c.last.Get("other").Int(), "what is not ours stays")
	c.query.Set("since", c.last.Get("next_batch").Str)
	c.at = to
	var told []string
	for _, e := range c.told().Array() {
		key := e.Get("type").Str + "|" + e.Get("state_key").Str
		c.known[key] = e.Get("event_id").Str
		told = append(told, e.Get("event_id").Str)
	}
	return told
}

func (c *client) told() gjson.Result {
	for _, where := range []string{"join", "leave"} {
		if told := c.last.Get("rooms." + where + "." + gjsonRoom + ".state_after.events"); told.Exists() {
			return told
		}
	}
	return gjson.Result{}
}

const gjsonRoom = `!room\:localhost`

func onEachDatabase(t *testing.T, test func(t *testing.T, h *history)) {
	t.Run("SQLite", func(t *testing.T) {
		test(t, newHistory(t, "file:"+filepath.Join(t.TempDir(), "syncapi.db")))
	})
	t.Run("PostgreSQL", func(t *testing.T) { test(t, newHistory(t, postgres.NewDatabase(t))) })
}
