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

// record is what Dendrite's syncapi has written down of the roomserver's output: with each event, which events it brought
// into the room's resolved state and which it took out, and what that state is now. Positions of the record are those of
// sync tokens. It is only read, and without transactions, which SQLite's has not: what is current is always read before the
// changes that came later, and so can be taken back to any position.
type record struct {
	db    *shared.Database
	sql   querier // the same database
	lists lists
	rsAPI roomserverAPI
}

// roomserverAPI knows the events that the record names and does not have, and the users of rooms that do not name them.
type roomserverAPI interface {
	QueryUserIDForSender(ctx context.Context, roomID spec.RoomID, senderID spec.SenderID) (*spec.UserID, error)
	QueryEventsByID(ctx context.Context, req *api.QueryEventsByIDRequest, res *api.QueryEventsByIDResponse) error
}

// end is a position after all others.
const end = types.StreamPosition(math.MaxInt64)

// atOnce is how many events are asked for in one query.
const atOnce = 500

func openRecord(ctx context.Context, cm *sqlutil.Connections, options *config.DatabaseOptions, rsAPI roomserverAPI) (*record, error) {
	db, err := storage.NewSyncServerDatasource(ctx, cm, options)
	if err != nil {
		return nil, err
	}
	// The interface hides the tables; a snapshot does not.
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

// rewind takes state back that is, or was a moment ago, the current state, or some of it: to what it was at a position. What
// changed since then is in it whole. If the room's state has been written anew since then, that is not known any more; then the
// state is returned as it is.
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

// events returns events by their IDs: as they are now, if they were redacted.
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
	for ids := range slices.Chunk(slices.Collect(maps.Keys(missing)), atOnce) {
		// Without a filter there is a limit on SQLite.
		written, err := r.db.OutputEvents.SelectEvents(ctx, nil, ids, &synctypes.RoomEventFilter{Limit: len(ids)}, false)
		if err != nil {
			return nil, err
		}
		for _, event := range written {
			found(event.HeaderedEvent)
		}
	}
	// State that was there before this server was is in no timeline.
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

// current returns the current state of a room but for the members, or with them.
func (r *record) current(ctx context.Context, roomID string, members bool) ([]*rstypes.HeaderedEvent, error) {
	filter := synctypes.DefaultStateFilter()
	if !members {
		filter.NotTypes = &[]string{spec.MRoomMember}
	}
	return r.db.CurrentRoomState.SelectCurrentState(ctx, nil, roomID, &filter, nil)
}

// redacted returns the same events, as they are now if they were redacted: the current state keeps them as they were.
func (r *record) redacted(ctx context.Context, events []*rstypes.HeaderedEvent) ([]*rstypes.HeaderedEvent, error) {
	places := make(map[string]int, len(events))
	for i, event := range events {
		places[event.EventID()] = i
	}
	for ids := range slices.Chunk(slices.Collect(maps.Keys(places)), atOnce) {
		written, err := r.db.OutputEvents.SelectEvents(ctx, nil, ids, &synctypes.RoomEventFilter{Limit: len(ids)}, false)
		if err != nil {
			return nil, fmt.Errorf("reading events: %w", err)
		}
		for _, event := range written {
			events[places[event.EventID()]] = event.HeaderedEvent
		}
	}
	return events, nil
}

func isCreate(event *rstypes.HeaderedEvent) bool {
	return event.Type() == spec.MRoomCreate && event.StateKeyEquals("")
}

// memberOf returns whose membership an event is about, or "".
func (r *record) memberOf(ctx context.Context, event *rstypes.HeaderedEvent) string {
	if event.Type() != spec.MRoomMember || event.StateKey() == nil {
		return ""
	}
	return r.userID(ctx, event.RoomID(), spec.SenderID(*event.StateKey()))
}

// userID returns the user behind a sender, which in most rooms is the same.
func (r *record) userID(ctx context.Context, roomID spec.RoomID, sender spec.SenderID) string {
	if userID, err := r.rsAPI.QueryUserIDForSender(ctx, roomID, sender); err == nil && userID != nil {
		return userID.String()
	}
	return string(sender)
}
