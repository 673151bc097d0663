package stateafter

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/lib/pq"
	rstypes "github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/dendrite/syncapi/types"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/tidwall/gjson"
)

// querier reads the syncapi's database with our own SQL. Dendrite's functions return either the sum of many changes, or one event at a
// time. To read each of many changes with them would take as many queries.
type querier interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
}

// change is what one event changed in the state of its room. added and removed are the IDs of state events.
type change struct {
	roomID, eventID string
	position        types.StreamPosition
	// member is the state key if the event itself is a member event, else "".
	member         string
	added, removed []string
}

// lists reads and writes lists of strings as the syncapi's tables have them: as arrays on PostgreSQL, and as JSON or NULL on SQLite.
type lists struct{ sqlite bool }

// among returns the condition that a column has one of several values. The argument for the parameter is the result of the method
// parameter.
func (l lists) among(column, parameter string) string {
	if l.sqlite {
		return column + " IN (SELECT value FROM json_each(" + parameter + "))"
	}
	return column + " = ANY(" + parameter + ")"
}

func (l lists) parameter(values []string) any {
	if !l.sqlite {
		return pq.StringArray(values)
	}
	data, _ := json.Marshal(values) // never fails for strings
	return string(data)
}

// into returns a destination for Scan that puts a list into values.
func (l lists) into(values *[]string) any {
	if l.sqlite {
		return (*jsonList)(values)
	}
	return (*pq.StringArray)(values)
}

// jsonList is a list of strings in JSON. The empty list is NULL or an empty text.
type jsonList []string

func (l *jsonList) Scan(column any) error {
	*l = nil
	switch text := column.(type) {
	case nil:
		return nil
	case string:
		if text == "" {
			return nil
		}
		return json.Unmarshal([]byte(text), (*[]string)(l))
	case []byte:
		return l.Scan(string(text))
	}
	return fmt.Errorf("a %T is not a list", column)
}

const (
	// The event itself is read only if it is a member event, because its state key says whose membership it is.
	selectChangesSQL = "SELECT room_id, event_id, id, CASE WHEN type = '" + spec.MRoomMember + "' THEN headered_event_json END," +
		" add_state_ids, remove_state_ids FROM syncapi_output_room_events" +
		" WHERE id > $1 AND id <= $2 AND (add_state_ids IS NOT NULL OR remove_state_ids IS NOT NULL) AND "
	selectMembersSQL = "SELECT headered_event_json FROM syncapi_current_room_state" +
		" WHERE room_id = $1 AND type = '" + spec.MRoomMember + "' AND "
)

// Orders in which changes are read.
const (
	oldestFirst = " ORDER BY id ASC"
	newestFirst = " ORDER BY id DESC"
)

// changes calls f with each change of the rooms after position from, up to and including position to. It makes one query. Only one change
// at a time is in memory, unless f keeps it.
func (r *record) changes(
	ctx context.Context, roomIDs []string, from, to types.StreamPosition, order string, f func(change),
) error {
	if from >= to || len(roomIDs) == 0 {
		return nil
	}
	query := selectChangesSQL + r.lists.among("room_id", "$3") + order
	rows, err := r.sql.QueryContext(ctx, query, from, to, r.lists.parameter(roomIDs))
	if err != nil {
		return fmt.Errorf("reading changes: %w", err)
	}
	defer func() { _ = rows.Close() }()
	for rows.Next() {
		var (
			c     change
			event sql.RawBytes
		)
		if err = rows.Scan(&c.roomID, &c.eventID, &c.position, &event, r.lists.into(&c.added), r.lists.into(&c.removed)); err != nil {
			return fmt.Errorf("reading changes: %w", err)
		}
		c.member = strings.Clone(gjson.GetBytes(event, "state_key").Str)
		c.removed = slices.DeleteFunc(c.removed, func(eventID string) bool { return slices.Contains(c.added, eventID) })
		if len(c.added) > 0 || len(c.removed) > 0 {
			f(c)
		}
	}
	if err = rows.Err(); err != nil {
		return fmt.Errorf("reading changes: %w", err)
	}
	return nil
}

// net returns the net effect of the changes after position from, up to and including position to, by room ID and event ID. The value is
// true if the event was last added to the state, and false if it was last removed.
func (r *record) net(
	ctx context.Context, from, to types.StreamPosition, roomIDs []string,
) (map[string]map[string]bool, error) {
	net := map[string]map[string]bool{}
	err := r.changes(ctx, roomIDs, from, to, oldestFirst, func(c change) {
		room := net[c.roomID]
		if room == nil {
			room = map[string]bool{}
			net[c.roomID] = room
		}
		for _, eventID := range c.removed {
			room[eventID] = false
		}
		for _, eventID := range c.added {
			room[eventID] = true
		}
	})
	return net, err
}

// undo takes a change back. It has the same result whether or not the state already contains the change. Later changes must be taken back
// first.
func (c *change) undo(state map[string]bool) {
	for _, eventID := range c.added {
		delete(state, eventID)
	}
	for _, eventID := range c.removed {
		state[eventID] = true
	}
}

// members returns the current member events of users.
func (r *record) members(ctx context.Context, roomID string, userIDs []string) (events []*rstypes.HeaderedEvent, err error) {
	if len(userIDs) == 0 {
		return nil, nil
	}
	rows, err := r.sql.QueryContext(ctx, selectMembersSQL+r.lists.among("state_key", "$2"), roomID, r.lists.parameter(userIDs))
	if err != nil {
		return nil, fmt.Errorf("reading members: %w", err)
	}
	defer func() { _ = rows.Close() }()
	for rows.Next() {
		var data sql.RawBytes
		event := &rstypes.HeaderedEvent{}
		if err = rows.Scan(&data); err == nil {
			err = json.Unmarshal(slices.Clone(data), event) // a copy, because the event may keep the bytes
		}
		if err != nil {
			return nil, fmt.Errorf("reading members: %w", err)
		}
		events = append(events, event)
	}
	if err = rows.Err(); err != nil {
		return nil, fmt.Errorf("reading members: %w", err)
	}
	return events, nil
}
