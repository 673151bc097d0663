package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// crowd is a set of users of one server, and of rooms that all of them are in.
type crowd struct {
	rooms []string
	users []*homeserver.Client
}

// must returns an error if a request failed.
func must(res homeserver.Response, err error) error {
	if err == nil && res.Code != http.StatusOK {
		err = errors.New(res.String())
	}
	return err
}

// httpClient keeps its connections. The default client closes them if there are many.
var httpClient = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: connections}}

// newCrowd makes users and rooms. The name must not be taken on the server.
func newCrowd(ctx context.Context, s *server, name string, rooms, users int) (*crowd, error) {
	c := &crowd{}
	for i := range users {
		u, err := s.Register(ctx, fmt.Sprintf("%s-%d", name, i))
		if err != nil {
			return nil, err
		}
		u.HTTP = httpClient
		c.users = append(c.users, u)
	}
	for range rooms {
		room, err := c.users[0].CreateRoom(ctx, nil)
		if err != nil {
			return nil, err
		}
		for _, u := range c.users[1:] {
			if err = u.Join(ctx, room); err != nil {
				return nil, err
			}
		}
		c.rooms = append(c.rooms, room)
	}
	return c, nil
}

// sendState sends the pieces of state with the given numbers, with the given concurrency. Function body returns their content. Successive
// pieces are in different rooms, and each piece has always the same sender.
func (c *crowd) sendState(ctx context.Context, from, to, concurrency int, body func() homeserver.JSON) (took time.Duration, err error) {
	start := time.Now()
	var next atomic.Int64
	next.Store(int64(from))
	group, ctx := errgroup.WithContext(ctx)
	for range min(concurrency, to-from) {
		group.Go(func() error {
			for {
				i := int(next.Add(1)) - 1
				if i >= to {
					return nil
				}
				room, key := c.rooms[i%len(c.rooms)], i/len(c.rooms)
				path := homeserver.StatePath(room, memberType, fmt.Sprintf("_participant%d", key))
				if err := must(c.users[key%len(c.users)].Do(ctx, http.MethodPut, path, body())); err != nil {
					return err
				}
			}
		})
	}
	err = group.Wait()
	return time.Since(start), err
}

// wakeTimeout is longer than the time in which a room's worker takes no events.
const wakeTimeout = 7 * time.Second

// wake makes sure that the worker of each room is running. In the last five seconds of a minute without work, a worker of stock Dendrite
// takes no events from its queue. An event that arrives then waits until the room's next event.
func (c *crowd) wake(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, room := range c.rooms {
		group.Go(func() error {
			for {
				patience, cancel := context.WithTimeout(ctx, wakeTimeout)
				err := must(c.users[0].Do(patience, http.MethodPut, homeserver.SendPath(room, "m.room.message"), homeserver.JSON{"body": "hello"}))
				deaf := patience.Err() != nil && ctx.Err() == nil
				cancel()
				if !deaf {
					return err
				}
			}
		})
	}
	return group.Wait()
}
