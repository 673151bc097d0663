package main

import (
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"
)

// participant is one device in one call, as LiveKit names both.
type participant struct{ room, identity string }

// leave is a delayed leave event: its URL at the homeserver, and its delay.
type leave struct {
	url   string
	delay time.Duration
}

// leaves are the delayed leave events that clients have entrusted: they are put off while LiveKit has the participant, and
// sent when it has not any more. One whose participant never comes is left to its delay.
type leaves struct {
	mu        sync.Mutex
	entrusted map[participant]leave
	connected map[participant]bool
}

func newLeaves() *leaves {
	return &leaves{entrusted: map[participant]leave{}, connected: map[participant]bool{}}
}

// entrust takes a leave event, in the place of one that the participant entrusted before.
func (l *leaves) entrust(p participant, event leave) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.entrusted[p] = event
	go l.keepOff(p, event)
}

func (l *leaves) joined(p participant) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.connected[p] = true
}

// left sends the leave event of somebody who is gone.
func (l *leaves) left(p participant) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.connected, p)
	if event, ok := l.entrusted[p]; ok {
		delete(l.entrusted, p)
		go event.do("send")
	}
}

// keepOff restarts a leave event at once, and again and again before its delay is over, as long as it is the participant's
// and the participant is connected.
func (l *leaves) keepOff(p participant, event leave) {
	for event.do("restart") {
		time.Sleep(event.delay * 4 / 5)
		l.mu.Lock()
		goOn := l.connected[p] && l.entrusted[p] == event
		l.mu.Unlock()
		if !goOn {
			return
		}
	}
}

// do has the homeserver do something with a delayed event, and reports whether it did. The delay ID is all it takes.
func (e leave) do(action string) bool {
	res, err := http.Post(e.url+"/"+action, "application/json", strings.NewReader("{}"))
	if err != nil {
		slog.Error("the homeserver is out of reach", "err", err)
		return false
	}
	defer res.Body.Close()
	slog.Info("delayed leave", "action", action, "status", res.Status)
	return res.StatusCode == http.StatusOK
}
