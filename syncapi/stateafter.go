package syncapi

import (
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/gorilla/mux"
	"github.com/matrix-org/dendrite/internal/httputil"
	"github.com/matrix-org/dendrite/internal/sqlutil"
	rstypes "github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/dendrite/setup/config"
	"github.com/matrix-org/dendrite/syncapi/synctypes"
	"github.com/matrix-org/dendrite/syncapi/types"
	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/matrix-org/util"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/around"
)

// StateAfter answers /sync as Dendrite does, but with the state at the end of each timeline in place of the state at its
// beginning, for clients that ask for it (MSC4222).
//
// Dendrite makes the answer; then the state in it is replaced by what its syncapi wrote down of the roomserver's resolved
// state, see [record]. What it tells: after any number of syncs, one from the next_batch of the other, a client has exactly
// the state that the room had at the last next_batch, whatever the roomserver has done since. State that came by state
// resolution, and is in no timeline, is in it, even if Dendrite would not have mentioned the room; state that came after
// next_batch is not, unless the room's state has been written anew meanwhile (which is told with the next sync). What is not in
// it: that state went away with nothing in its place, which the MSC has no words for; and state that changes by resolution
// together with a redaction, of which Dendrite's syncapi takes no notice.
type StateAfter struct {
	dendrite http.Handler
	record   *record
}

// The names of the parameter and of the field, as the specification has them and as they were before.
const (
	parameter         = "use_state_after"
	unstableParameter = "org.matrix.msc4222.use_state_after"
	field             = "state_after"
	unstableField     = "org.matrix.msc4222.state_after"
)

// NewStateAfter opens the syncapi's database.
func NewStateAfter(
	ctx context.Context, cm *sqlutil.Connections, options *config.DatabaseOptions, rsAPI roomserverAPI,
) (*StateAfter, error) {
	record, err := openRecord(ctx, cm, options, rsAPI)
	if err != nil {
		return nil, err
	}
	return &StateAfter{record: record}, nil
}

// AddRoutes registers the route. It must be called before Dendrite registers its own, which gets all requests that do not have
// the parameter.
func (s *StateAfter) AddRoutes(router *mux.Router, userAPI userapi.QueryAcccessTokenAPI) {
	s.dendrite = router
	router.Handle("/{apiversion:(?:r0|v3)}/sync",
		httputil.MakeAuthAPI("sync_state_after", userAPI, s.sync, httputil.WithAllowGuests()),
	).Methods(http.MethodGet).MatcherFunc(around.First).MatcherFunc(func(req *http.Request, _ *mux.RouteMatch) bool {
		return strings.Contains(req.URL.RawQuery, parameter) && fieldFor(req.URL.Query()) != ""
	})
}

// fieldFor returns the name of the field that a request asks for, or "".
func fieldFor(query url.Values) string {
	switch {
	case query.Get(parameter) == "true":
		return field
	case query.Get(unstableParameter) == "true":
		return unstableField
	}
	return ""
}

func (s *StateAfter) sync(req *http.Request, device *userapi.Device) util.JSONResponse {
	answer, body, ok := around.Dendrite(s.dendrite, req)
	if !ok {
		return answer
	}
	query := req.URL.Query()
	result, err := s.replace(req.Context(), body, query, device, fieldFor(query))
	if err != nil {
		if !errors.Is(err, context.Canceled) {
			util.GetLogger(req.Context()).WithError(err).Error("Failed to find the state after a sync")
		}
		return util.JSONResponse{Code: http.StatusInternalServerError, JSON: spec.InternalServerError{}}
	}
	return util.JSONResponse{Code: http.StatusOK, JSON: result}
}

// object is a JSON object of which only some keys are looked at.
type object = map[string]json.RawMessage

// replace puts the field with this name into all rooms of an answer, in place of their state.
func (s *StateAfter) replace(
	ctx context.Context, body []byte, query url.Values, device *userapi.Device, name string,
) (object, error) {
	q, err := s.question(ctx, query, gjson.GetBytes(body, "next_batch").Str, device)
	if err != nil {
		return nil, err
	}
	var (
		answer, rooms object
		join, leave   map[string]object
	)
	for _, part := range []struct {
		data json.RawMessage
		into any
	}{
		{body, &answer},
		{[]byte(gjson.GetBytes(body, "rooms").Raw), &rooms},
		{[]byte(gjson.GetBytes(body, "rooms.join").Raw), &join},
		{[]byte(gjson.GetBytes(body, "rooms.leave").Raw), &leave},
	} {
		if len(part.data) == 0 {
			continue
		}
		if err = json.Unmarshal(part.data, part.into); err != nil {
			return nil, fmt.Errorf("reading an answer: %w", err)
		}
	}
	if err = q.look(ctx, slices.AppendSeq(slices.Collect(maps.Keys(join)), maps.Keys(leave))); err != nil {
		return nil, err
	}
	put := func(room object, roomID string, events []*rstypes.HeaderedEvent) error {
		data, err := json.Marshal(struct {
			Events []synctypes.ClientEvent `json:"events"`
		}{q.clientEvents(ctx, events)})
		delete(room, "state")
		room[name] = data
		return err
	}
	for roomID, room := range join {
		events, err := q.joined(ctx, roomID, membersIn(room))
		if err == nil {
			err = put(room, roomID, events)
		}
		if err != nil {
			return nil, err
		}
	}
	for roomID, room := range leave {
		events, err := q.left(ctx, roomID, membersIn(room))
		if err == nil {
			err = put(room, roomID, events)
		}
		if err != nil {
			return nil, err
		}
	}
	for _, roomID := range q.unmentioned {
		events, err := q.silent(ctx, roomID)
		if err != nil {
			return nil, err
		}
		if len(events) == 0 {
			continue
		}
		if join == nil {
			join = map[string]object{}
		}
		join[roomID] = object{}
		if err = put(join[roomID], roomID, events); err != nil {
			return nil, err
		}
	}
	return answer, assemble(answer, rooms, join, leave)
}

// assemble puts the parts of an answer together again.
func assemble(answer, rooms object, join, leave map[string]object) (err error) {
	if len(join) == 0 && len(leave) == 0 {
		return nil
	}
	if rooms == nil {
		rooms = object{}
	}
	for key, part := range map[string]map[string]object{"join": join, "leave": leave} {
		if len(part) > 0 {
			if rooms[key], err = json.Marshal(part); err != nil {
				return err
			}
		}
	}
	answer["rooms"], err = json.Marshal(rooms)
	return err
}

// members are users whose membership the answer for a room makes necessary, or at least useful.
type members struct {
	// senders are those of the timeline.
	senders []string
	// others have a member event in the timeline, or are needed for the room's name.
	others []string
	// loaded are those that Dendrite has put into the state because the client may not know them yet.
	loaded []string
}

func membersIn(room object) (m members) {
	for _, event := range gjson.GetBytes(room["timeline"], "events").Array() {
		m.senders = append(m.senders, event.Get("sender").Str)
		if key := event.Get("state_key"); key.Exists() && event.Get("type").Str == spec.MRoomMember {
			m.others = append(m.others, key.Str)
		}
	}
	for _, hero := range gjson.GetBytes(room["summary"], `m\.heroes`).Array() {
		m.others = append(m.others, hero.Str)
	}
	for _, event := range gjson.GetBytes(room["state"], "events").Array() {
		if event.Get("type").Str == spec.MRoomMember {
			m.loaded = append(m.loaded, event.Get("state_key").Str)
		}
	}
	return m
}

// question is what one request asks.
type question struct {
	*StateAfter
	userID   string
	filter   synctypes.Filter
	from, to types.StreamPosition
	// whole is whether the client knows nothing, or wants to be told everything again.
	whole bool

	// changed and events are the changes of all rooms, as record.net has them.
	changed map[string]map[string]bool
	events  map[string]types.StreamEvent
	// unmentioned are rooms with the user in them that changed and are not in the answer.
	unmentioned []string
}

func (s *StateAfter) question(
	ctx context.Context, query url.Values, nextBatch string, device *userapi.Device,
) (*question, error) {
	q := &question{StateAfter: s, userID: device.UserID, filter: synctypes.DefaultFilter()}
	to, err := types.NewStreamTokenFromString(nextBatch)
	if err != nil {
		return nil, fmt.Errorf("reading next_batch: %w", err)
	}
	q.to = to.PDUPosition
	var from types.StreamingToken
	if since := query.Get("since"); since != "" {
		if from, err = types.NewStreamTokenFromString(since); err != nil {
			return nil, fmt.Errorf("reading since: %w", err)
		}
	}
	q.from = from.PDUPosition
	fullState := query.Get("full_state")
	q.whole = from.IsEmpty() || (fullState != "" && fullState != "false")
	filter := query.Get("filter")
	switch {
	case filter == "":
	case strings.HasPrefix(filter, "{"):
		err = json.Unmarshal([]byte(filter), &q.filter)
	default:
		var localpart string
		if localpart, _, err = gomatrixserverlib.SplitID('@', q.userID); err != nil {
			break
		}
		if err = s.record.db.GetFilter(ctx, &q.filter, localpart, filter); errors.Is(err, sql.ErrNoRows) {
			err = nil
		}
	}
	if err != nil {
		return nil, fmt.Errorf("reading the filter: %w", err)
	}
	return q, nil
}

// look finds out what has changed, in these rooms and in all others with the user in them.
func (q *question) look(ctx context.Context, mentioned []string) error {
	if q.whole || q.from >= q.to {
		return nil
	}
	joined, err := q.record.db.CurrentRoomState.SelectRoomIDsWithMembership(ctx, nil, q.userID, spec.Join)
	if err != nil {
		return err
	}
	all := slices.Concat(mentioned, joined)
	slices.Sort(all)
	if q.changed, q.events, err = q.record.net(ctx, q.from, q.to, slices.Compact(all)); err != nil {
		return err
	}
	for _, roomID := range joined {
		if len(q.changed[roomID]) > 0 && !slices.Contains(mentioned, roomID) {
			q.unmentioned = append(q.unmentioned, roomID)
		}
	}
	return nil
}

// joined returns the state of a room that is to be told to a user in it.
func (q *question) joined(ctx context.Context, roomID string, m members) ([]*rstypes.HeaderedEvent, error) {
	if q.whole {
		return q.all(ctx, roomID, q.to, m)
	}
	delta, err := q.added(ctx, roomID, q.changed[roomID])
	if err != nil {
		return nil, err
	}
	if slices.ContainsFunc(delta, q.own(ctx)) {
		changes, err := q.record.changes(ctx, roomID, q.from, q.to)
		if err != nil {
			return nil, err
		}
		stay, err := q.record.stay(ctx, roomID, q.userID, changes)
		if err != nil {
			return nil, err
		}
		if stay.entered {
			return q.all(ctx, roomID, q.to, m)
		}
	}
	if slices.ContainsFunc(delta, isCreate) { // the room's state was written anew
		return q.all(ctx, roomID, q.to, m)
	}
	return q.with(ctx, roomID, delta, q.to, m)
}

// left returns the state of a room that is to be told to a user who went out of it, or was never in it: nothing that came
// afterwards but the user's own membership.
func (q *question) left(ctx context.Context, roomID string, m members) ([]*rstypes.HeaderedEvent, error) {
	changes, err := q.record.changes(ctx, roomID, q.from, q.to)
	if err != nil {
		return nil, err
	}
	stay, err := q.record.stay(ctx, roomID, q.userID, changes)
	if err != nil {
		return nil, err
	}
	var state []*rstypes.HeaderedEvent
	switch {
	case stay.left == 0:
	case stay.entered:
		state, err = q.all(ctx, roomID, stay.left, m)
	default:
		var net map[string]map[string]bool
		if net, _, err = q.record.net(ctx, q.from, stay.left, []string{roomID}); err != nil {
			return nil, err
		}
		if state, err = q.added(ctx, roomID, net[roomID]); err != nil {
			return nil, err
		}
		state, err = q.with(ctx, roomID, state, stay.left, m)
	}
	if stay.last != nil {
		state = slices.DeleteFunc(state, q.own(ctx))
		state = append(state, stay.last)
	}
	return state, err
}

// silent returns the state of a room that Dendrite had nothing to tell about, if the user was in it.
func (q *question) silent(ctx context.Context, roomID string) ([]*rstypes.HeaderedEvent, error) {
	own, err := q.memberships(ctx, roomID, []string{q.userID}, q.to)
	if err != nil || len(own) == 0 || !isJoin(own[0]) {
		return nil, err
	}
	state, err := q.joined(ctx, roomID, members{})
	return q.filtered(ctx, state), err
}

// added returns the events of a set of changes that came in the end, and are in the state.
func (q *question) added(ctx context.Context, roomID string, net map[string]bool) ([]*rstypes.HeaderedEvent, error) {
	var ids []string
	for eventID, added := range net {
		if added {
			ids = append(ids, eventID)
		}
	}
	return q.record.events(ctx, roomID, ids, q.events)
}

// all returns the whole state of a room at a position, but of the members only those that are needed, if the client wants to
// load them as they are needed.
func (q *question) all(
	ctx context.Context, roomID string, at types.StreamPosition, m members,
) ([]*rstypes.HeaderedEvent, error) {
	lazy := q.filter.Room.State.LazyLoadMembers
	current, err := q.record.current(ctx, roomID, !lazy)
	if err != nil {
		return nil, err
	}
	needed := users(m.senders, m.others, []string{q.userID})
	if lazy {
		members, err := q.record.members(ctx, roomID, needed)
		if err != nil {
			return nil, err
		}
		current = append(current, members...)
	}
	state, err := q.record.rewind(ctx, roomID, current, at)
	if err != nil {
		return nil, err
	}
	if lazy {
		state = slices.DeleteFunc(state, func(event *rstypes.HeaderedEvent) bool {
			userID := q.record.memberOf(ctx, event)
			return userID != "" && !slices.Contains(needed, userID)
		})
	}
	return q.record.redacted(ctx, state)
}

// with adds to changes the members that the client may need to show the timeline, if it loads them as they are needed. All
// members that changed are among the changes: the timeline is not what tells it.
func (q *question) with(
	ctx context.Context, roomID string, delta []*rstypes.HeaderedEvent, at types.StreamPosition, m members,
) ([]*rstypes.HeaderedEvent, error) {
	filter := &q.filter.Room.State
	if !filter.LazyLoadMembers {
		return delta, nil
	}
	var again []string
	if filter.IncludeRedundantMembers {
		again = m.senders
	}
	needed := users(m.loaded, m.others, again)
	for _, event := range delta {
		if i := slices.Index(needed, q.record.memberOf(ctx, event)); i >= 0 {
			needed = slices.Delete(needed, i, i+1)
		}
	}
	memberships, err := q.memberships(ctx, roomID, needed, at)
	return append(delta, memberships...), err
}

// memberships returns the member events of users at a position.
func (q *question) memberships(
	ctx context.Context, roomID string, userIDs []string, at types.StreamPosition,
) ([]*rstypes.HeaderedEvent, error) {
	if len(userIDs) == 0 {
		return nil, nil
	}
	events, err := q.record.members(ctx, roomID, userIDs)
	if err != nil {
		return nil, err
	}
	if events, err = q.record.rewind(ctx, roomID, events, at); err != nil {
		return nil, err
	}
	events = slices.DeleteFunc(events, func(event *rstypes.HeaderedEvent) bool {
		return !slices.Contains(userIDs, q.record.memberOf(ctx, event))
	})
	return q.record.redacted(ctx, events)
}

// users returns users, each once.
func users(userIDs ...[]string) []string {
	all := slices.Concat(userIDs...)
	slices.Sort(all)
	return slices.Compact(all)
}

// own returns a function that reports whether an event is about the membership of the user who asks.
func (q *question) own(ctx context.Context) func(*rstypes.HeaderedEvent) bool {
	return func(event *rstypes.HeaderedEvent) bool { return q.record.memberOf(ctx, event) == q.userID }
}

// filtered returns the events that the client's filter lets through.
func (q *question) filtered(ctx context.Context, events []*rstypes.HeaderedEvent) []*rstypes.HeaderedEvent {
	return slices.DeleteFunc(events, func(event *rstypes.HeaderedEvent) bool {
		return !wanted(&q.filter.Room.State, event, q.record.userID(ctx, event.RoomID(), event.SenderID()))
	})
}

// clientEvents returns events as the client is to get them, the oldest first.
func (q *question) clientEvents(ctx context.Context, events []*rstypes.HeaderedEvent) []synctypes.ClientEvent {
	events = q.filtered(ctx, events)
	slices.SortFunc(events, func(a, b *rstypes.HeaderedEvent) int {
		return cmp.Or(cmp.Compare(a.Depth(), b.Depth()), cmp.Compare(a.EventID(), b.EventID()))
	})
	format := synctypes.FormatSync
	if q.filter.EventFormat == synctypes.EventFormatFederation {
		format = synctypes.FormatSyncFederation
	}
	return synctypes.ToClientEvents(gomatrixserverlib.ToPDUs(events), format,
		func(roomID spec.RoomID, senderID spec.SenderID) (*spec.UserID, error) {
			return q.record.rsAPI.QueryUserIDForSender(ctx, roomID, senderID)
		})
}
