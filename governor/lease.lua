-- Takes, renews or releases the lease. A script is one step for Redis: of all who ask, at most one has it.
-- KEYS  the lease
-- ARGV  'take' or 'release', owner, owner as JSON, life in microseconds, highest epoch the caller has seen,
--       an owner that is known to have died ('' for none)
-- Reply {owner ('' for nobody), epoch, microseconds left}, as it is after the call
-- Uses GET, SET and TIME. Whatever is in the key is read as far as it makes sense; the rest counts as nobody's.

local LONGEST = 3600000000
-- Far beyond anything counted, and still a whole number in a double: an epoch written by hand ends here.
local LAST_EPOCH = 4503599627370496

local function number(value, most)
  if type(value) == 'number' and value >= 0 and value <= most then return value end
  return nil
end

local function micros(seconds)
  local value = number(seconds, LAST_EPOCH / 1000000)
  return value and math.floor(value * 1000000 + 0.5)
end

local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])

local function read()
  local text = redis.pcall('GET', KEYS[1])
  if type(text) == 'table' and not string.find(tostring(text.err), 'WRONGTYPE', 1, true) then error(tostring(text.err)) end
  local ok, value = pcall(cjson.decode, text)
  if not ok or type(value) ~= 'table' then return {epoch = 0} end
  local epoch = number(value.epoch, LAST_EPOCH)
  if not epoch or epoch % 1 ~= 0 then return {epoch = 0} end
  local till, life = micros(value['until']), micros(value.seconds)
  if type(value.owner) ~= 'string' or value.owner == '' or not till or not life then return {epoch = epoch} end
  local left = till - now
  -- More left than it ever lasts: this clock was put back, or is another server's.
  if left > math.min(life, LONGEST) then left = 0 end
  return {owner = value.owner, epoch = epoch, since = micros(value.since) or now, left = math.max(left, 0)}
end

local function write(owner, epoch, since, life)
  redis.call('SET', KEYS[1], string.format(
    '{"owner":%s,"epoch":%.0f,"since":%.6f,"until":%.6f,"seconds":%.6f}',
    owner, epoch, since / 1000000, (now + life) / 1000000, life / 1000000
  ))
end

local function reply(owner, epoch, left)
  return {owner, string.format('%.0f', epoch), string.format('%.0f', left)}
end

local lease, owner, seen = read(), ARGV[2], tonumber(ARGV[5])

if ARGV[1] == 'release' then
  if lease.owner ~= owner then return reply(lease.owner or '', lease.epoch, lease.left or 0) end
  -- The epoch stays, for the next one to count on.
  write('null', lease.epoch, now, 0)
  return reply('', lease.epoch, 0)
end

-- With an epoch older than one seen before it is a copy brought back: not to be gone on with.
local mine = lease.owner == owner and lease.epoch >= seen
if lease.owner and lease.owner ~= owner and lease.owner ~= ARGV[6] and lease.left > 0 then
  return reply(lease.owner, lease.epoch, lease.left)
end
local epoch, since = lease.epoch, lease.since
if not mine then
  epoch, since = math.min(math.max(lease.epoch, seen) + 1, LAST_EPOCH), now
end
local life = tonumber(ARGV[4])
write(ARGV[3], epoch, since, life)
return reply(owner, epoch, life)
