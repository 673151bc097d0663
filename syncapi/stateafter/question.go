package stateafter

import (
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"

	rstypes "github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/dendrite/syncapi/synctypes"
	"github.com/matrix-org/dendrite/syncapi/types"
	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/tidwall/gjson"
)

// question is what one sync request asks for.
type question struct {
	*Route
	userID   string
	filter   synctypes.Filter
	from, to types.StreamPosition
	// whole is whether the answer has the whole state, because it is the client's first sync or because of full_state.
	whole bool

	// changed has the net changes of all rooms, as record.net returns them.
	changed map[string]map[string]bool
	// unmentioned are rooms that the user is in whose state has changed, but that are not in Dendrite's answer.
	unmentioned []string
}

func (s *Route) question(
	ctx context.Context, query url.Values, nextBatch string, device *userapi.Device,
) (*question, error) {
	q := &question{Route: s, userID: device.UserID, filter: synctypes.DefaultFilter()}
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

// look reads the changes of the rooms in Dendrite's answer, and of all other rooms that the user is in.
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
	if q.changed, err = q.record.net(ctx, q.from, q.to, slices.Compact(all)); err != nil {
		return err
	}
	for _, roomID := range joined {
		if len(q.changed[roomID]) > 0 && !slices.Contains(mentioned, roomID) {
			q.unmentioned = append(q.unmentioned, roomID)
		}
	}
	return nil
}

// joined returns the state that the answer has for a room that the user is in.
func (q *question) joined(ctx context.Context, roomID string, m members) ([]*rstypes.HeaderedEvent, error) {
	if q.whole {
		return q.all(ctx, roomID, q.to, m)
	}
	delta, err := q.added(ctx, roomID, q.changed[roomID])
	if err != nil {
		return nil, err
	}
	if slices.ContainsFunc(delta, q.own(ctx)) {
		stay, err := q.record.stay(ctx, roomID, q.userID, q.from, q.to)
		if err != nil {
			return nil, err
		}
		if stay.entered {
			return q.all(ctx, roomID, q.to, m)
		}
	}
	return q.with(ctx, roomID, delta, q.to, m)
}

// left returns the state that the answer has for a room that the user has left, or was never in. It has nothing from after the user left,
// except for the user's own membership.
func (q *question) left(ctx context.Context, roomID string, m members) ([]*rstypes.HeaderedEvent, error) {
	stay, err := q.record.stay(ctx, roomID, q.userID, q.from, q.to)
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
		if net, err = q.record.net(ctx, q.from, stay.left, []string{roomID}); err != nil {
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

// retired returns the user's member event from the timeline, if the state has none. When an invite is refused or withdrawn, Dendrite makes
// up such an event: perhaps this server is not in the room, or the real event arrives later.
func (q *question) retired(ctx context.Context, roomID string, room object, state []*rstypes.HeaderedEvent) []synctypes.ClientEvent {
	if slices.ContainsFunc(state, q.own(ctx)) {
		return nil
	}
	for _, event := range gjson.GetBytes(room["timeline"], "events").Array() {
		var e synctypes.ClientEvent
		if event.Get("type").Str == spec.MRoomMember && event.Get("state_key").Str == q.userID &&
			json.Unmarshal([]byte(event.Raw), &e) == nil && wanted(&q.filter.Room.State, roomID, e.Sender, e.Type, e.Content) {
			return []synctypes.ClientEvent{e}
		}
	}
	return nil
}

// silent returns the changed state of a room that is not in Dendrite's answer, if the user was in the room at next_batch.
func (q *question) silent(ctx context.Context, roomID string) ([]*rstypes.HeaderedEvent, error) {
	own, err := q.memberships(ctx, roomID, []string{q.userID}, q.to)
	if err != nil || len(own) == 0 || !isJoin(own[0]) {
		return nil, err
	}
	state, err := q.joined(ctx, roomID, members{})
	return q.filtered(ctx, state), err
}

// added returns the events that a set of net changes added to the state.
func (q *question) added(ctx context.Context, roomID string, net map[string]bool) ([]*rstypes.HeaderedEvent, error) {
	var ids []string
	for eventID, added := range net {
		if added {
			ids = append(ids, eventID)
		}
	}
	return q.record.events(ctx, roomID, ids)
}

// all returns the whole state of a room at a position. If the client loads members lazily, it leaves out members that are not needed.
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

// with returns delta, the changed state, and if the client loads members lazily, also the members that it may need to show the timeline.
// Members that changed are in delta already, whether or not they are in the timeline. If delta has an m.room.create event, the room's state
// was rewritten; then with returns the whole state.
func (q *question) with(
	ctx context.Context, roomID string, delta []*rstypes.HeaderedEvent, at types.StreamPosition, m members,
) ([]*rstypes.HeaderedEvent, error) {
	if slices.ContainsFunc(delta, isCreate) {
		return q.all(ctx, roomID, at, m)
	}
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

// users returns the users of all lists, each user once.
func users(userIDs ...[]string) []string {
	all := slices.Concat(userIDs...)
	slices.Sort(all)
	return slices.Compact(all)
}

// own returns a function that reports whether an event is a member event of the user who syncs.
func (q *question) own(ctx context.Context) func(*rstypes.HeaderedEvent) bool {
	return func(event *rstypes.HeaderedEvent) bool { return q.record.memberOf(ctx, event) == q.userID }
}

// filtered returns the events that the client's filter admits.
func (q *question) filtered(ctx context.Context, events []*rstypes.HeaderedEvent) []*rstypes.HeaderedEvent {
	return slices.DeleteFunc(events, func(event *rstypes.HeaderedEvent) bool {
		sender := q.record.userID(ctx, event.RoomID(), event.SenderID())
		return !wanted(&q.filter.Room.State, event.RoomID().String(), sender, event.Type(), event.Content())
	})
}

// clientEvents filters events and returns them in the client's format, the oldest first.
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
