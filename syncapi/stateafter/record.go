package stateafter

import (
	"context"
	"fmt"
	"maps"
	"math"
	"slices"

	"github.com/matrix-org/dendrite/internal/sqlutil"
	"github.com/matrix-org/dendrite/roomserver/api"
	rstypes "github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/dendrite/setup/config"
	"github.com/matrix-org/dendrite/syncapi/storage"
	"github.com/matrix-org/dendrite/syncapi/storage/shared"
	"github.com/matrix-org/dendrite/syncapi/synctypes"
	"github.com/matrix-org/dendrite/syncapi/types"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/sirupsen/logrus"
)

// record is what Dendrite's syncapi has stored of the roomserver's output: which state events each event added to the room's resolved state
// and which it removed, and the current state. Its positions are those of sync tokens.
//
// It is read-only, and read without a snapshot, because SQLite offers none here. The current state is always read first and later changes
// second, so that the state can be rewound to any position.
type record struct {
	db    *shared.Database
	sql   querier // the same database
	lists lists
	rsAPI roomserverAPI
}

// roomserverAPI has what the record lacks: events that it names but does not contain, and the users of rooms with pseudo IDs.
type roomserverAPI interface {
	QueryUserIDForSender(ctx context.Context, roomID spec.RoomID, senderID spec.SenderID) (*spec.UserID, error)
	QueryEventsByID(ctx context.Context, req *api.QueryEventsByIDRequest, res *api.QueryEventsByIDResponse) error
}

// end is a position after all others.
const end = types.StreamPosition(math.MaxInt64)

// atOnce is how many events one query reads at most.
const atOnce = 500

func openRecord(ctx context.Context, cm *sqlutil.Connections, options *config.DatabaseOptions, rsAPI roomserverAPI) (*record, error) {
	db, err := storage.NewSyncServerDatasource(ctx, cm, options)
	if err != nil {
		return nil, err
	}
	// Dendrite's interface hides the tables. A snapshot gives access to them.
	snapshot, err := db.NewDatabaseSnapshot(ctx)
	if err != nil {
		return nil, err
	}
	if err = snapshot.Rollback(); err != nil {
		return nil, err
	}
	connections, _, err := cm.Connection(options)
	if err != nil {
		return nil, err
	}
	return &record{
		db: snapshot.Database, sql: connections, lists: lists{sqlite: options.ConnectionString.IsSQLite()}, rsAPI: rsAPI,
	}, nil
}

// rewind returns the state that a room had at a position. The argument state is the current state, or a part of it, and may be slightly out
// of date. All state that has changed since the position is in the result, even if only a part was given. If the room's state has been
// rewritten since, the earlier state is not known any more, and rewind returns its argument.
func (r *record) rewind(
	ctx context.Context, roomID string, state []*rstypes.HeaderedEvent, to types.StreamPosition,
) ([]*rstypes.HeaderedEvent, error) {
	ids := make(map[string]bool, len(state))
	for _, event := range state {
		ids[event.EventID()] = true
	}
	changed := false
	err := r.changes(ctx, []string{roomID}, to, end, newestFirst, func(c change) {
		changed = true
		c.undo(ids)
	})
	if err != nil || !changed {
		return state, err
	}
	before := make([]*rstypes.HeaderedEvent, 0, len(ids))
	for _, event := range state {
		if ids[event.EventID()] {
			before = append(before, event)
			delete(ids, event.EventID())
		}
	}
	if slices.ContainsFunc(state, isCreate) && !slices.ContainsFunc(before, isCreate) {
		return state, nil
	}
	others, err := r.events(ctx, roomID, slices.Collect(maps.Keys(ids)))
	return append(before, others...), err
}

// events returns events by their IDs. Redacted events are returned in their redacted form.
func (r *record) events(ctx context.Context, roomID string, eventIDs []string) (events []*rstypes.HeaderedEvent, err error) {
	missing := map[string]bool{}
	for _, eventID := range eventIDs {
		missing[eventID] = true
	}
	found := func(event *rstypes.HeaderedEvent) {
		if missing[event.EventID()] {
			delete(missing, event.EventID())
			events = append(events, event)
		}
	}
	if err = r.written(ctx, slices.Collect(maps.Keys(missing)), found); err != nil {
		return nil, err
	}
	// State from before this server was in the room is in no timeline.
	for ids := range slices.Chunk(slices.Collect(maps.Keys(missing)), atOnce) {
		current, err := r.db.CurrentRoomState.SelectEventsWithEventIDs(ctx, nil, ids)
		if err != nil {
			return nil, err
		}
		for _, event := range current {
			found(event.HeaderedEvent)
		}
	}
	if len(missing) > 0 {
		var res api.QueryEventsByIDResponse
		req := api.QueryEventsByIDRequest{RoomID: roomID, EventIDs: slices.Collect(maps.Keys(missing))}
		if err = r.rsAPI.QueryEventsByID(ctx, &req, &res); err != nil {
			return nil, err
		}
		for _, event := range res.Events {
			found(event)
		}
	}
	if len(missing) > 0 {
		logrus.WithField("room_id", roomID).Warnf("State after: %d events are not known", len(missing))
	}
	return events, nil
}

// current returns the current state of a room, with or without its members.
func (r *record) current(ctx context.Context, roomID string, members bool) ([]*rstypes.HeaderedEvent, error) {
	filter := synctypes.DefaultStateFilter()
	if !members {
		filter.NotTypes = &[]string{spec.MRoomMember}
	}
	return r.db.CurrentRoomState.SelectCurrentState(ctx, nil, roomID, &filter, nil)
}

// redacted replaces redacted events by their redacted form. The table of the current state has only the original form.
func (r *record) redacted(ctx context.Context, events []*rstypes.HeaderedEvent) ([]*rstypes.HeaderedEvent, error) {
	places := make(map[string]int, len(events))
	for i, event := range events {
		places[event.EventID()] = i
	}
	err := r.written(ctx, slices.Collect(maps.Keys(places)), func(event *rstypes.HeaderedEvent) {
		events[places[event.EventID()]] = event
	})
	return events, err
}

// written calls f with those of the events that are in a timeline, in their redacted form if they are redacted.
func (r *record) written(ctx context.Context, eventIDs []string, f func(*rstypes.HeaderedEvent)) error {
	for ids := range slices.Chunk(eventIDs, atOnce) {
		// Without a filter, SelectEvents returns at most 20 events on SQLite.
		events, err := r.db.OutputEvents.SelectEvents(ctx, nil, ids, &synctypes.RoomEventFilter{Limit: len(ids)}, false)
		if err != nil {
			return fmt.Errorf("reading events: %w", err)
		}
		for _, event := range events {
			f(event.HeaderedEvent)
		}
	}
	return nil
}

func isCreate(event *rstypes.HeaderedEvent) bool {
	return event.Type() == spec.MRoomCreate && event.StateKeyEquals("")
}

// memberOf returns the user whose membership an event is about, or "" if it is not a member event.
func (r *record) memberOf(ctx context.Context, event *rstypes.HeaderedEvent) string {
	if event.Type() != spec.MRoomMember || event.StateKey() == nil {
		return ""
	}
	return r.userID(ctx, event.RoomID(), spec.SenderID(*event.StateKey()))
}

// userID returns the user ID that belongs to a sender ID. In rooms without pseudo IDs they are equal.
func (r *record) userID(ctx context.Context, roomID spec.RoomID, sender spec.SenderID) string {
	if userID, err := r.rsAPI.QueryUserIDForSender(ctx, roomID, sender); err == nil && userID != nil {
		return userID.String()
	}
	return string(sender)
}
