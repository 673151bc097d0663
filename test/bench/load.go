package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"sync"
	"time"
)

const (
	// connections is how many clients refresh at the same time, as far as nothing else is said.
	connections = 64
	// manyConnections are so many that there is always one that does not wait for a commit.
	manyConnections = 256
)

// load is what a server has answered.
type load struct {
	perSecond float64
	latencies []time.Duration // sorted
}

// refresh makes keep-alives for the tokens in turn, for the given time, and fails if one is not answered with 200. With a
// rate, in requests per second, it keeps to that; with 0 it makes as many as it can. A latency counts from when the request
// was due.
func refresh(ctx context.Context, address string, tokens []string, d time.Duration, rate float64) (load, error) {
	return refreshBy(ctx, connections, address, tokens, d, rate)
}

// refreshBy is refresh by so many clients.
func refreshBy(ctx context.Context, clients int, address string, tokens []string, d time.Duration, rate float64) (load, error) {
	var (
		wg     sync.WaitGroup
		mu     sync.Mutex // guards total and failed
		total  load
		failed error
		start  = time.Now()
	)
	for i := range clients {
		wg.Go(func() {
			c := client{address: address, tokens: tokens, next: i * len(tokens) / clients}
			if rate > 0 {
				c.interval = time.Duration(float64(clients) / rate * float64(time.Second))
				c.first = c.interval * time.Duration(i) / time.Duration(clients) // not all of them at once
			}
			err := c.run(ctx, start, d)
			mu.Lock()
			defer mu.Unlock()
			total.latencies = append(total.latencies, c.latencies...)
			if failed == nil {
				failed = err
			}
		})
	}
	wg.Wait()
	if failed != nil {
		return load{}, failed
	}
	total.perSecond = float64(len(total.latencies)) / time.Since(start).Seconds()
	slices.Sort(total.latencies)
	return total, nil
}

// client is one connection. It writes requests and reads answers itself: an HTTP client would take more of the machine than
// the servers that are compared.
type client struct {
	address   string
	tokens    []string
	next      int
	latencies []time.Duration
	// interval is the time from one request to the next, and first the time until the first. 0: as many as it can.
	interval, first time.Duration
}

func (c *client) run(ctx context.Context, start time.Time, d time.Duration) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", c.address)
	if err != nil {
		return err
	}
	defer conn.Close()
	answers := bufio.NewReader(conn)
	var request []byte
	for due := time.Now().Add(c.first); time.Since(start) < d && ctx.Err() == nil; due = due.Add(c.interval) {
		if c.interval > 0 {
			<-time.After(time.Until(due))
		} else {
			due = time.Now()
		}
		token := c.tokens[c.next%len(c.tokens)]
		c.next++
		request = fmt.Appendf(request[:0], "PUT /_matrix/client/v3/expiration/refresh HTTP/1.1\r\nHost: localhost\r\n"+
			"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n{\"expire_refresh_token\":\"%s\"}", 27+len(token), token)
		if _, err = conn.Write(request); err != nil {
			return err
		}
		if err = readAnswer(answers); err != nil {
			return err
		}
		c.latencies = append(c.latencies, time.Since(due))
	}
	return ctx.Err()
}

// readAnswer reads one answer, which must be 200.
func readAnswer(r *bufio.Reader) error {
	status, err := r.ReadSlice('\n')
	if err != nil {
		return err
	}
	if !bytes.HasPrefix(status, []byte("HTTP/1.1 200")) {
		answer := string(status)
		rest, _ := r.Peek(r.Buffered())
		return fmt.Errorf("answered with %q and %q", answer, rest)
	}
	length := -1
	for {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return err
		}
		line = bytes.TrimSpace(line)
		if len(line) == 0 {
			break
		}
		if name, value, ok := bytes.Cut(line, []byte(": ")); ok && bytes.EqualFold(name, []byte("Content-Length")) {
			if length, err = strconv.Atoi(string(value)); err != nil {
				return err
			}
		}
	}
	if length < 0 {
		return errors.New("an answer without a length")
	}
	_, err = io.CopyN(io.Discard, r, int64(length))
	return err
}
