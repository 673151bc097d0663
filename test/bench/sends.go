package main

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

const (
	// sendRooms is the number of rooms that the sends are spread over.
	sendRooms = 4
	// memberType is the type of the events with which clients take part in calls.
	memberType = "m.call.member"
)

// sends compares plain sends on our server with those on stock Dendrite, and expiring sends with plain ones. The sends alternate between
// the two sides, one by one, in rooms with the same history.
func (b *comparison) sends(ctx context.Context) error {
	_, stop, err := b.startBoth(ctx)
	if err != nil {
		return err
	}
	defer stop()
	pairs := []struct {
		what, goal, plot string
		servers          [2]*server
		names            [2]string
		senders          [2]*sender
	}{
		{what: "send of a message without the field, ours / stock Dendrite", goal: "≤ 1.02", plot: "send-message",
			servers: [2]*server{b.own, b.stock}, names: [2]string{"ours", "stock Dendrite"}, senders: [2]*sender{{}, {}}},
		{what: "send of state without the field, ours / stock Dendrite", goal: "≤ 1.02", plot: "send-state",
			servers: [2]*server{b.own, b.stock}, names: [2]string{"ours", "stock Dendrite"}, senders: [2]*sender{{state: true}, {state: true}}},
		{what: "send of an expiring message / of a plain one", goal: "≤ 1.10", plot: "send-expiring-message",
			servers: [2]*server{b.own, b.own}, names: [2]string{"expiring", "plain"}, senders: [2]*sender{{expiring: true}, {}}},
		{what: "send of expiring state / of plain state", goal: "≤ 1.10", plot: "send-expiring-state",
			servers: [2]*server{b.own, b.own}, names: [2]string{"expiring", "plain"}, senders: [2]*sender{{expiring: true, state: true}, {state: true}}},
	}
	// The pairs run one after the other, and those with stock Dendrite first. Events that only one server gets would make its databases
	// larger.
	for _, p := range pairs {
		for i, s := range p.senders {
			if s.crowd, err = newCrowd(ctx, p.servers[i], p.plot+fmt.Sprint(i), sendRooms, 1); err != nil {
				return err
			}
			for range 2 * sendRooms { // to fill the caches
				if err = s.send(ctx); err != nil {
					return err
				}
			}
			s.latencies = nil
		}
		var ratios []float64
		for round := range *rounds {
			medians, err := alternate(ctx, p.senders, *turn)
			if err != nil {
				return err
			}
			ratios = append(ratios, float64(medians[0])/float64(medians[1]))
			progress("%s: round %d of %d: %s: %s / %s", b.name, round+1, *rounds, p.what, medians[0], medians[1])
		}
		b.add(p.what+", median", p.goal, "", ratios)
		d := drawing{title: "Latency of sends", x: "latency (ms)", y: percent}
		for i, s := range p.senders {
			d.lines = append(d.lines, shares(p.names[i], s.latencies))
		}
		if p.senders[0].state {
			d.title = "Latency of sends of state"
		}
		if err = b.plot(p.plot, d); err != nil {
			return err
		}
	}
	return nil
}

// alternate sends by both senders in turn for the given time, and returns the medians of their latencies. The first sender changes each
// time, because a server still works after its answer, and that work then delays both senders alike.
func alternate(ctx context.Context, senders [2]*sender, d time.Duration) (medians [2]time.Duration, err error) {
	already := [2]int{len(senders[0].latencies), len(senders[1].latencies)}
	for start, n := time.Now(), 0; time.Since(start) < d; n++ {
		for i := range senders {
			if err = senders[(i+n)%2].send(ctx); err != nil {
				return medians, err
			}
		}
	}
	for i, s := range senders {
		medians[i] = median(s.latencies[already[i]:])
	}
	return medians, nil
}

// sender sends events of one kind, one after the other.
type sender struct {
	*crowd
	state, expiring bool
	sent            int
	latencies       []time.Duration
}

func (s *sender) send(ctx context.Context) error {
	room := s.rooms[s.sent%len(s.rooms)]
	body := homeserver.JSON{"msgtype": "m.text", "body": fmt.Sprintf("This is message number %d.", s.sent)}
	if s.expiring {
		body["m.will_expire"] = int(endless.Seconds())
	}
	path := homeserver.SendPath(room, "m.room.message")
	if s.state { // a participant leaves the call and comes back
		path = homeserver.StatePath(room, memberType, fmt.Sprintf("_participant%d", s.sent/len(s.rooms)%participantsPerRoom))
	}
	s.sent++
	start := time.Now()
	err := must(s.users[0].Do(ctx, http.MethodPut, path, body))
	s.latencies = append(s.latencies, time.Since(start))
	return err
}
