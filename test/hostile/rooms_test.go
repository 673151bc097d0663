//go:build all

package hostile

import (
	"context"
	"fmt"
	"sync"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

const (
	// inputsPerRoom is the number of inputs after which a room is replaced by a new one, and refusalsPerRoom the number of forbidden inputs.
	// Earlier inputs may have made a room useless.
	inputsPerRoom   = 40
	refusalsPerRoom = 6
)

// roomPool has a room of each version for each user. The next user is also in the room.
type roomPool struct {
	users []*homeserver.Client
	mu    sync.Mutex
	rooms map[string]*pooledRoom
}

type pooledRoom struct {
	mu             sync.Mutex
	place          place
	used, refusals int
}

func newRoomPool(users []*homeserver.Client) *roomPool {
	return &roomPool{users: users, rooms: map[string]*pooledRoom{}}
}

func (p *roomPool) room(version string, user int) *pooledRoom {
	p.mu.Lock()
	defer p.mu.Unlock()
	key := fmt.Sprint(user, " ", version)
	if p.rooms[key] == nil {
		p.rooms[key] = &pooledRoom{}
	}
	return p.rooms[key]
}

// get returns a user's room, and creates one if need be.
func (p *roomPool) get(ctx context.Context, version string, user int) (place, error) {
	room := p.room(version, user)
	room.mu.Lock()
	defer room.mu.Unlock()
	if room.place.room != "" && room.used < inputsPerRoom && room.refusals < refusalsPerRoom {
		return room.place, nil
	}
	me, other := p.users[user], p.users[(user+1)%len(p.users)]
	body := JSON{}
	if version != "" {
		body["room_version"] = version
	}
	roomID, err := me.CreateRoom(ctx, body)
	if err != nil {
		return place{}, err
	}
	_ = other.Join(ctx, roomID) // some room versions do not allow the join
	room.place, room.used, room.refusals = place{roomID, me.UserID, other.UserID}, 0, 0
	return room.place, nil
}

// used counts an input that was sent to a room.
func (p *roomPool) used(version string, user int, refused bool) {
	room := p.room(version, user)
	room.mu.Lock()
	defer room.mu.Unlock()
	room.used++
	if refused {
		room.refusals++
	}
}
